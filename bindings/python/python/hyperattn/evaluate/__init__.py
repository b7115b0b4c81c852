"""Measures a method of hyperattn on real models: `python -m hyperattn.evaluate --help`."""
