"""Volumes that are read: formats, metadata, arrays."""
