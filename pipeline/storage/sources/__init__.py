"""Volumes that are read: a module for each format (`*_volume`), listed in `open`, and how levels are read (`*_array`)."""
