"""The fidelity volume: where SR, averaged over a measured voxel, disagrees with it."""

from __future__ import annotations

import numpy as np

from pipeline.storage.volume import Uint8Array
from pipeline.worker.pyramid import pair_sums

_BLOCK_VOXELS = 1 << 18
"""SR voxels added up at a time: their sums stay in the core's cache."""


def back_projection_error(lr: Uint8Array, sr: Uint8Array, scale: int) -> Uint8Array:
    """|mean of each r x r block of SR - measured LR voxel| in grey levels, rounded half up: uint8 (D, h, w).

    `lr` is (D, h, w), `sr` (D, rh, rw), `scale` a power of two, from 2 to 16: the largest sum then has 16 bits. The
    result is 0 where the SR image, averaged over the LR voxel, agrees with the microscope.
    """
    _, h, w = lr.shape
    area = scale * scale
    sums = np.empty(lr.shape, np.int32)
    step = max(1, _BLOCK_VOXELS // (scale * scale * w))
    for section, total in zip(sr, sums, strict=True):
        for first in range(0, h, step):
            pairs = pair_sums(section[first * scale : (first + step) * scale])
            columns = pairs.reshape(-1, scale, w * scale // 2).sum(axis=1, dtype=np.uint16)
            while columns.shape[1] > w:
                columns = columns[:, 0::2] + columns[:, 1::2]
            total[first : first + step] = columns
    error: Uint8Array = ((2 * np.abs(sums - lr.astype(np.int32) * area) + area) // (2 * area)).astype(np.uint8)
    return error
