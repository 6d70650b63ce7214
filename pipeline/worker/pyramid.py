"""One pyramid level from the one before: lateral 2x2 means, rounded half up, at every level alike."""

from __future__ import annotations

import numpy as np

from pipeline.storage.volume import Uint8Array

_BLOCK_VOXELS = 1 << 17
"""Voxels averaged at a time: their sums stay in the core's cache, which is what makes this fast."""


def halve(voxels: Uint8Array) -> Uint8Array:
    """(z, y, x) -> (z, ceil(y / 2), ceil(x / 2)): each voxel is (a + b + c + d + 2) >> 2 of its 2x2.

    An odd last row or column counts twice. Level k is `halve` applied k times (means of rounded means). ValueError
    unless uint8 with three axes.
    """
    if voxels.dtype != np.uint8 or voxels.ndim != 3:
        raise ValueError(f"halve takes uint8 (z, y, x), not {voxels.dtype} {voxels.shape}")
    z, y, x = voxels.shape
    out = np.empty((z, -(-y // 2), -(-x // 2)), np.uint8)
    if out.size == 0:
        return out
    if y % 2 or x % 2:
        voxels = np.pad(voxels, ((0, 0), (0, y % 2), (0, x % 2)), mode="edge")
    step = max(1, _BLOCK_VOXELS // (2 * voxels.shape[2]))
    for section, means in zip(voxels, out, strict=True):
        for first in range(0, len(means), step):
            rows = section[2 * first : 2 * (first + step)]
            sums = np.add(rows[0::2], rows[1::2], dtype=np.uint16)
            total = sums[:, 0::2] + sums[:, 1::2]
            total += 2
            total >>= 2
            means[first : first + step] = total
    return out
