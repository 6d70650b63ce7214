"""Boxes, errors, retries and exit codes: what every other package imports."""
