"""Boxes, errors, retries and exit codes: what every other room stands on."""
