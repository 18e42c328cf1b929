"""Trained models, opened and compared."""
