"""emsr: super-resolution of serial-section electron microscopy at any size."""

__version__ = "0.1.0"
