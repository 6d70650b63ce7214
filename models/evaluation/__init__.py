"""Metrics that compare images with ground truth. They take arrays and give numbers."""
