"""Volumes that are written: one module for each format's metadata and codecs, and the encoding that they share."""
