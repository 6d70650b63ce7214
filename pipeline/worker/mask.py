"""Which voxels of a mask touch a slab. Both are volumes over the same space, the mask perhaps coarser."""

from __future__ import annotations

import numpy as np

from pipeline.base.geometry import Box
from pipeline.storage.volume import Source, VolumeInfo


def touches(mask: Source, source: VolumeInfo, lr: Box) -> bool:
    """Whether a mask voxel that touches the source's voxels `lr` is not 0. Raises what `Source.read` raises."""
    return bool(mask.read(mask_box(mask.info, source, lr)).any())


def mask_box(mask: VolumeInfo, source: VolumeInfo, lr: Box) -> Box:
    """The mask's voxels that touch the source's voxels `lr`; empty where none does."""
    start, stop = [], []
    for axis in range(3):
        lo = source.corner_nm[axis] + list(lr.start)[axis] * source.voxel_size_nm[axis]
        hi = source.corner_nm[axis] + list(lr.stop)[axis] * source.voxel_size_nm[axis]
        size = mask.voxel_size_nm[axis]
        start.append(int(np.floor((lo - mask.corner_nm[axis]) / size + 1e-6)))
        stop.append(int(np.ceil((hi - mask.corner_nm[axis]) / size - 1e-6)))
    return Box.of(start, stop).intersect(mask.bounds)
