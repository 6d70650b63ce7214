"""Scores of images against ground truth: arrays in, numbers out."""
