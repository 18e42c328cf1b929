"""Measurements behind every table and figure of README and docs: python -m benchmarks.NAME."""
