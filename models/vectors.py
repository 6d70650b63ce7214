"""Reference vectors: what networks make of sections that a formula gives, computed once in float32 on a CPU.

`vectors.npz`, which benchmarks/reference_vectors.py writes, holds per vector the SR section in steps of 1 / STEPS,
and the indices of all sections of the window. Weights that no file has are a formula of integers too, so that no
generator of random numbers decides them. Importing this does not import torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.config import preset

PATH = Path(__file__).with_name("vectors.npz")
STEPS = 65535
"""SR is stored rounded to 1 / STEPS, so it is off by at most 8e-6."""
FORMULA = "formula"
LICENCE = "CC0-1.0"


@dataclass(frozen=True)
class Vector:
    """A window of `shape` (sections, rows, columns) whose first voxel is `start` (z, y, x) of the formula's space.

    `weights` is as in volume.yaml, or FORMULA. `start` is chosen such that the two likeliest codes of every token are
    far apart, so that rounding alone exchanges none.
    """

    name: str
    preset: str
    scale: int
    weights: str
    shape: tuple[int, int, int]
    start: tuple[int, int, int]


VECTORS = (
    Vector("flyem-medulla x8", "small", 8, "builtin:flyem-medulla", (5, 16, 24), (810, 0, 0)),
    Vector("flyem-medulla x16", "small", 16, "builtin:flyem-medulla", (5, 8, 16), (20, 0, 0)),
    Vector("paper x8", "paper", 8, FORMULA, (5, 16, 16), (335, 0, 0)),
    Vector("paper x16", "paper", 16, FORMULA, (5, 8, 16), (45, 0, 0)),
)


def expected(vector: Vector) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """SR of the window's centre (rH, rW), and the indices of its sections (N, rH/p, rW/p)."""
    with np.load(PATH) as arrays:
        sr = arrays[f"{vector.name} sr"].astype(np.float64) / STEPS
        return sr.astype(np.float32), arrays[f"{vector.name} indices"].astype(np.int64)


def voxels(start: Sequence[int], shape: Sequence[int]) -> NDArray[np.uint8]:
    """Grey levels (z, y, x) of a box of a space without end: stripes that move from section to section, and noise."""
    z, y, x = np.meshgrid(*(np.arange(a, a + n) for a, n in zip(start, shape, strict=True)), indexing="ij")
    noise = _hash((z * 1_000_003 + y * 10_007 + x).astype(np.uint32)) >> np.uint32(27)  # 0 .. 31
    grey = 40 + _stripes(3 * x + 5 * y + 4 * z, 61) + _stripes(5 * x - 2 * y + 3 * z, 97) + noise
    return grey.astype(np.uint8)


def _stripes(phase: NDArray[np.int64], period: int) -> NDArray[np.int64]:
    """0 .. 80."""
    return np.abs(2 * (phase % period) - period) * 80 // period


def weight(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The formula's value of a parameter: kernels have the variance 1 / inputs, the codebook 1/4, other factors are
    about 1 and biases about 0.
    """
    count = int(np.prod(shape))
    bits = _hash(np.arange(count, dtype=np.uint32) + np.uint32(zlib.crc32(name.encode())))
    unit = (bits >> np.uint32(8)).astype(np.float32) / np.float32(1 << 23) - 1  # -1 .. 1, variance 1/3
    unit = unit.reshape(shape)
    if "codebook" in name:
        return unit * np.float32(np.sqrt(3 / 4))
    if len(shape) > 1:
        return unit * np.float32(np.sqrt(3 / (count // shape[0])))
    return np.float32(1) + unit * np.float32(1 / 8) if name.endswith("weight") else unit * np.float32(1 / 16)


def _hash(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The last step of MurmurHash3 (Appleby, 2011), which spreads every bit over all."""
    bits = bits ^ (bits >> np.uint32(16))
    bits = bits * np.uint32(0x85EBCA6B)
    bits = bits ^ (bits >> np.uint32(13))
    bits = bits * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))


def write_weights(path: Path, scale: int, name: str) -> None:
    """Write the formula's weights of a preset as a weights file of float16 numbers. Raises OSError."""
    import torch

    from models import weights
    from models.network import SuperResolver

    with torch.device("meta"):
        network = SuperResolver(preset(scale, name))
    network.to_empty(device="cpu")
    with torch.no_grad():
        for key, value in network.state_dict().items():
            value.copy_(torch.from_numpy(weight(key, tuple(value.shape))))
    weights.save(path, network, LICENCE, half=True)
