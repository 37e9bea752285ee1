"""Exact nearest-neighbour search, retrieval metrics and evaluation."""
