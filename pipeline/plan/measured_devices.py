"""Devices whose rates come with emsr, for a price before the device itself can be asked.

They are what benchmarks/gpu/network.py measured (docs/performance.md, "On a GPU"); a later measurement replaces them.
"""

from __future__ import annotations

from pipeline.plan.rates import MeasuredDevice, Rate

MEASURED_DEVICES = (
    MeasuredDevice(
        "cuda NVIDIA H100 80GB HBM3",
        81_559 << 20,
        "2026-11-27",
        "eager, one tile at a time, no CUDA graphs",
        (
            Rate("gpemsr", "paper", 8, 64, 16, "float32", 1, 45.15, 58.45),
            Rate("gpemsr", "paper", 8, 64, 16, "tf32", 1, 18.65, 16.98),
            Rate("gpemsr", "paper", 8, 128, 16, "float32", 1, 119.3, 188.6),
            Rate("gpemsr", "paper", 8, 128, 16, "tf32", 1, 35.24, 38.33),
            Rate("gpemsr", "paper", 16, 64, 24, "float32", 1, 223.6, 128.5),
            Rate("gpemsr", "paper", 16, 64, 24, "tf32", 1, 66.23, 32.45),
            Rate("gpemsr", "small", 8, 64, 16, "float32", 1, 18.36, 19.51),
            Rate("gpemsr", "small", 8, 64, 16, "tf32", 1, 14.69, 14.11),
        ),
    ),
)
