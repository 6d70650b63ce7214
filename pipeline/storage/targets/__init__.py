"""Volumes that are written: metadata, encoding, sharding."""
