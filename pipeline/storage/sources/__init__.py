"""Volumes that are read: a module for each format (`*_volume`), listed in `open`; how a level is read (`*_array`)."""
