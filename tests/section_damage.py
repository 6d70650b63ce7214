"""A microscope, a knife or an alignment loses sections in these ways: HR stack, its z and a generator -> HR section."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Damage = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _half(hr: np.ndarray, z: int) -> np.ndarray:
    return hr[z][:, : hr.shape[2] // 2]


def _sign(rng: np.random.Generator) -> int:
    return int(rng.choice([-1, 1]))


DAMAGES: dict[str, Damage] = {
    "black": lambda hr, z, rng: np.zeros_like(hr[z]),
    "half black": lambda hr, z, rng: np.where(np.arange(hr.shape[2]) < hr.shape[2] // 2, 0, hr[z]),
    "constant": lambda hr, z, rng: np.full_like(hr[z], rng.integers(1, 255)),
    "white": lambda hr, z, rng: np.full_like(hr[z], 255),
    "saturated": lambda hr, z, rng: np.clip(hr[z].astype(int) * 6, 0, 255),
    "low contrast": lambda hr, z, rng: 128 + (hr[z].astype(float) - 128) / 4,
    "noise": lambda hr, z, rng: rng.integers(0, 256, hr[z].shape),
    "coarse noise": lambda hr, z, rng: np.kron(
        rng.integers(60, 200, [-(-n // 8) for n in hr[z].shape]), np.ones((8, 8))
    )[: hr.shape[1], : hr.shape[2]],
    "folded, half mirrored": lambda hr, z, rng: np.concatenate([_half(hr, z), _half(hr, z)[:, ::-1]], 1),
    "half doubled": lambda hr, z, rng: np.concatenate([_half(hr, z), _half(hr, z)], 1),
    "upside down": lambda hr, z, rng: hr[z][::-1],
    "shifted by 64": lambda hr, z, rng: np.roll(hr[z], 64 * _sign(rng), int(rng.integers(2))),
    "shifted by 96 both ways": lambda hr, z, rng: np.roll(hr[z], (96, -96), (0, 1)),
    "shifted by 200": lambda hr, z, rng: np.roll(hr[z], 200 * _sign(rng), int(rng.integers(2))),
    "from far away": lambda hr, z, rng: hr[(z + len(hr) // 2) % len(hr)],
}
