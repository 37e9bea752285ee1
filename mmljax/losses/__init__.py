"""Losses, miners and combinations: pure functions that import only JAX and NumPy."""
