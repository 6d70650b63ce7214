"""The process that computes: its device and the memory free there, its own size, its heap, a watch over its progress."""
