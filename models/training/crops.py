"""Random crops of consecutive sections, LR and HR.

Sample i of step s depends on the seed, s and i alone, so that a resumed run has the samples of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.degrade import HALO, degrade

Bytes = NDArray[np.uint8]
Read = Callable[[slice, slice, slice], Bytes]
"""Reads the voxels of a volume, uint8, at slices of z, y and x."""


@dataclass(frozen=True)
class Volume:
    """A volume to learn from. `hr` reads its HR sections, `shape` is their (z, y, x) in voxels, and `good` tells for
    every section whether it may be used. `lr` reads the LR sections of the same tissue where they were really scanned;
    each side is smaller by the scale. Without `lr`, LR is made from HR.
    """

    shape: tuple[int, int, int]
    hr: Read
    good: NDArray[np.bool_]
    lr: Read | None = None

    def starts(self, sections: int) -> NDArray[np.intp]:
        """The z of all runs of `sections` consecutive good sections, by their first section."""
        runs = (
            np.lib.stride_tricks.sliding_window_view(self.good, sections).all(1)
            if len(self.good) >= sections
            else np.zeros(0, bool)
        )
        return np.flatnonzero(runs)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of samples. `flips` turns on horizontal flip, vertical flip and transposition, each for half of
    the samples and for all sections of a sample alike (network.md, section 4). `drift` shifts every section by up to so
    many HR voxels. `noise` is the standard deviation of Gaussian noise that is added to LR, in grey values.
    """

    flips: bool = True
    drift: int = 0
    noise: float = 0.0


@dataclass(frozen=True)
class Crops:
    """Draws samples of `sections` consecutive sections of `size` x `size` HR voxels from `volumes`."""

    volumes: list[Volume]
    sections: int
    size: int
    scale: int
    augmentation: Augmentation = field(default_factory=Augmentation)

    def batch(self, seed: int, step: int, count: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """`count` samples of one step: LR (B, N, 1, h, w) and HR (B, N, 1, H, W) in 0..1.

        The ranks share the samples of a step: rank r has those from number r * `count` on.
        """
        first = rank * count
        pairs = [self.sample(np.random.default_rng([seed, step, 0, i])) for i in range(first, first + count)]
        lr, hr = (torch.from_numpy(np.stack(part)).float().div_(255)[:, :, None] for part in zip(*pairs, strict=True))
        return lr, hr

    def sample(self, rng: np.random.Generator) -> tuple[Bytes, Bytes]:
        """One sample, LR (N, h, w) and HR (N, H, W). A volume is drawn with a probability proportional to the number of
        its windows.
        """
        starts = [volume.starts(self.sections) for volume in self.volumes]
        ends = np.cumsum([len(s) for s in starts])
        drawn = int(rng.integers(ends[-1]))
        which = int(np.searchsorted(ends, drawn, side="right"))
        volume, z = self.volumes[which], int(starts[which][drawn - ends[which]])
        step = self.scale if volume.lr is not None else 1
        drift = self.augmentation.drift // step * step
        low, high = np.array((drift, drift)), np.array(volume.shape[1:]) - self.size - drift
        y, x = (int(rng.integers(a, b + 1)) * step for a, b in zip(-(-low // step), high // step, strict=True))
        lr: list[Bytes] = []
        hr: list[Bytes] = []
        for i in range(self.sections):
            dy, dx = (int(d) // step * step for d in rng.integers(-drift, drift + 1, 2))
            crop = pair(volume, self.scale, z + i, (y + dy, x + dx), (self.size, self.size))
            for part, image in zip((lr, hr), crop, strict=True):
                part.append(image)
        return self._augmented(rng, np.stack(lr), np.stack(hr))

    def _augmented(self, rng: np.random.Generator, lr: Bytes, hr: Bytes) -> tuple[Bytes, Bytes]:
        if self.augmentation.flips:
            vertical, horizontal, transposed = rng.random(3) < 0.5
            if vertical:
                lr, hr = lr[:, ::-1], hr[:, ::-1]
            if horizontal:
                lr, hr = lr[:, :, ::-1], hr[:, :, ::-1]
            if transposed:
                lr, hr = lr.transpose(0, 2, 1), hr.transpose(0, 2, 1)
        if self.augmentation.noise:
            lr = np.rint(lr + rng.normal(0, self.augmentation.noise, lr.shape)).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(lr), np.ascontiguousarray(hr)


def pair(volume: Volume, scale: int, z: int, corner: tuple[int, int], size: tuple[int, int]) -> tuple[Bytes, Bytes]:
    """LR (h / scale, w / scale) and HR (h, w) of the rectangle of section z that begins at `corner` (y, x) and has
    `size` (h, w), all in HR voxels and multiples of the scale. LR is made from a larger crop, so that it is that of the
    whole section.
    """
    (y, x), (h, w), r = corner, size, scale
    if volume.lr is not None:
        lr = volume.lr(slice(z, z + 1), slice(y // r, (y + h) // r), slice(x // r, (x + w) // r))
        return lr[0], volume.hr(slice(z, z + 1), slice(y, y + h), slice(x, x + w))[0]
    _, height, width = volume.shape
    up, left = min(HALO, y // r), min(HALO, x // r)
    down, right = min(HALO, (height - y - h) // r), min(HALO, (width - x - w) // r)
    wide = volume.hr(slice(z, z + 1), slice(y - up * r, y + h + down * r), slice(x - left * r, x + w + right * r))[0]
    lr = degrade(wide, r)[up : up + h // r, left : left + w // r]
    return lr, wide[up * r : up * r + h, left * r : left * r + w]


def centre_windows(volume: Volume, sections: int, size: int, scale: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Windows for validation: up to `count`, evenly spread in z, of the middle of every section, at most `size` x
    `size` HR voxels. Each is LR (1, N, 1, h, w) and HR (1, N, 1, H, W) in 0..1.
    """
    starts = volume.starts(sections)
    height, width = (min(size, length) // (4 * scale) * (4 * scale) for length in volume.shape[1:])
    corner = ((volume.shape[1] - height) // 2 // scale * scale, (volume.shape[2] - width) // 2 // scale * scale)
    windows = []
    for z in starts[np.unique(np.linspace(0, len(starts) - 1, count).round().astype(int))] if len(starts) else []:
        pairs = [pair(volume, scale, int(z) + i, corner, (height, width)) for i in range(sections)]
        lr, hr = (
            torch.from_numpy(np.stack(part)).float().div_(255)[None, :, None] for part in zip(*pairs, strict=True)
        )
        windows.append((lr, hr))
    return windows
