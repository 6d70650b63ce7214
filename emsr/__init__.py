"""emsr: super-resolution of serial-section electron microscopy at any size. This is what other programs import."""

__version__ = "0.1.0"
