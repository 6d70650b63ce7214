"""The process that computes: its device and what memory is free there, its own size, its heap, a watchdog."""
