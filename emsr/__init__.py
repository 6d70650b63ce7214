"""emsr: super-resolution of serial-section electron microscopy at any size. What other programs may import; importing it is cheap."""

__version__ = "0.1.0"
