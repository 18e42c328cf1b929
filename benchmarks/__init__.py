"""Measurements behind the README's tables and figures: python -m benchmarks.NAME."""
