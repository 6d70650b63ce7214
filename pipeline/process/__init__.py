"""The process that computes: its device, its heap, and a watch over its progress."""
