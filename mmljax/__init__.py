"""Metric learning for image retrieval with several objectives at once."""
