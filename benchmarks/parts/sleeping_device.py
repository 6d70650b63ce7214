"""A device that takes time but no processor and works through a queue, like a GPU: it sleeps SLEEPING_CENTRE_MS for
each section of each cell. As on a GPU, a slab is queued until its last tile when `begin` returns.

It replaces `begin` in every process that imports this module, where that variable is set. What it gives back are
voxels of an enlarged section, the same array for every slab. SLEEPING_LOG names a file to which it appends a line for
each slab: when the device began to work for it, and when it had done so.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from pipeline.inference import tiles
from pipeline.plan.plan import Slab
from pipeline.worker import slab as one_slab

_free_at = 0.0
_voxels: dict[tuple[int, ...], NDArray[np.uint8]] = {}
_making = threading.Lock()
_begin = tiles.begin


class _Queued(tiles.Pending):
    """What has been computed when the device has slept until `end`."""

    def __init__(self, voxels: NDArray[np.uint8], end: float) -> None:
        self._ready, self._end = voxels, end

    def finish(self) -> NDArray[np.uint8]:
        sleep_until(self._end)
        return self._ready


def sleep_until(end: float) -> None:
    time.sleep(max(0.0, end - time.perf_counter()))


def begin(
    network: Any, lr: NDArray[np.uint8], sections: Sequence[int], slab: Slab, caches: Any = None
) -> tiles.Pending:
    """The slab is put behind those that the device has. DEVICE_LOCK is held, as for the real one."""
    global _free_at
    centre_ms = os.environ.get("SLEEPING_CENTRE_MS")
    if centre_ms is None:
        return _begin(network, lr, sections, slab, caches)
    voxels = _enlarged(lr, slab, network.spec.scale)
    count = sum(1 for _ in network.spec.lattice.cells(slab.lr))
    tile_s = slab.lr.shape.z * float(centre_ms) / 1000
    start = max(time.perf_counter(), _free_at)
    _free_at = start + count * tile_s
    with open(os.environ["SLEEPING_LOG"], "a") as log:
        log.write(f"{start} {_free_at}\n")
    sleep_until(_free_at - tile_s)
    return _Queued(voxels, _free_at)


def _enlarged(lr: NDArray[np.uint8], slab: Slab, scale: int) -> NDArray[np.uint8]:
    """The process's first slab, enlarged, for all slabs of its shape: no processor makes voxels while others encode."""
    shape = tuple(slab.lr.shape.lateral(scale))
    with _making:
        if shape not in _voxels:
            d, h, w = slab.lr.shape
            sections = torch.from_numpy(np.ascontiguousarray(lr[:d, :h, :w])).float()[:, None]
            large = functional.interpolate(sections, scale_factor=scale, mode="bicubic")
            _voxels[shape] = large[:, 0].clamp_(0, 255).to(torch.uint8).numpy()
    return _voxels[shape]


one_slab.begin = begin
