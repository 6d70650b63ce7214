"""What `emsr doctor` does: whether the devices of this machine compute what they should, and how fast."""
