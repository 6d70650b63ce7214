"""The tiles of a slab, batch after batch: cut on the lattice, padded, through the network, put together.

Which padding a network has stands in models/catalog. What stands in beyond the ends in z is Plan.section.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.base.geometry import ZYX, Box
from pipeline.inference.network import Network, SectionCache
from pipeline.plan.plan import Slab
from pipeline.process.device import Landing

DEVICE_LOCK = threading.Lock()
"""Held by one slab at a time around `begin`: slabs in flight overlap their reading and writing, never the device."""

SectionCaches = dict[tuple[int, int], SectionCache]
"""A cache for every batch of tiles, by the (y, x) of its first cell. A lease carries them from slab to slab, so that a
z-halo costs no network time.
"""


class Pending:
    """The SR voxels of a slab, which its device may still compute."""

    def __init__(self, network: Network, slab: Slab) -> None:
        scale = network.spec.scale
        self._network, self._slab = network, slab
        self._out = np.empty(tuple(slab.lr.shape.lateral(scale)), np.uint8)
        self._landing: tuple[Landing, list[Box]] | None = None

    def add(self, landing: Landing, cells: list[Box]) -> None:
        """The tiles of `cells` were queued. What was queued before them is waited for; nothing is on a CPU, which has
        computed them.
        """
        before, self._landing = self._landing, (landing, cells)
        self._take(before)
        if not landing.waits:
            self._take((landing, cells))
            self._landing = None

    def finish(self) -> NDArray[np.uint8]:
        """Wait for all of them: uint8 (D, rh, rw). Raises as `super_resolve`."""
        before, self._landing = self._landing, None
        self._take(before)
        return self._out

    def _take(self, landed: tuple[Landing, list[Box]] | None) -> None:
        if landed is None:
            return
        landing, cells = landed
        lattice, scale = self._network.spec.lattice, self._network.spec.scale
        with self._network.memory_errors(self._slab.lr), landing.finish() as grey:  # (D, B, rC, rC)
            for at, cell in enumerate(cells):  # the tiles beyond `cells` are repeats
                whole = lattice.whole_cell(cell)
                part = cell.lateral(scale).slices(whole.start.lateral(scale))
                place = cell.lateral(scale).slices(self._slab.lr.start.lateral(scale))
                self._out[place] = grey[:, at][:, part[1], part[2]]


def begin(
    network: Network, lr: NDArray[np.uint8], sections: Sequence[int], slab: Slab, caches: SectionCaches | None = None
) -> Pending:
    """Queue a slab on the network's device: `finish` of the result gives what `super_resolve` does. A CPU has computed
    it when this returns, a GPU all but the last batch of tiles.
    """
    lattice, batch = network.spec.lattice, network.spec.batch
    have = Box(ZYX(0, slab.read.start.y, slab.read.start.x), ZYX(len(lr), slab.read.stop.y, slab.read.stop.x))
    pending = Pending(network, slab)
    all_cells = list(lattice.cells(slab.lr))
    for at in range(0, len(all_cells), batch):
        cells, tiles = all_cells[at : at + batch], []
        for cell in cells:
            want = lattice.with_halo(cell)
            real = have.intersect(_laterally(want, have))
            tiles.append(pad_laterally(lr[_crop(want, have)], real, want, lattice.padding))
        tiles += tiles[-1:] * (batch - len(tiles))  # a batch has one size: another would be other bytes
        first = cells[0].start
        cache: SectionCache = {} if caches is None else caches.setdefault((first.y, first.x), {})
        with network.memory_errors(slab.lr):
            landing = network.tiles(np.stack(tiles, 1), sections, cache)
        pending.add(landing, cells)
    return pending


def super_resolve(
    network: Network, lr: NDArray[np.uint8], sections: Sequence[int], slab: Slab, caches: SectionCaches | None = None
) -> NDArray[np.uint8]:
    """The SR voxels of `slab`, uint8 (D, rh, rw).

    `lr` are the LR voxels (D + window - 1, h, w) of `slab.read` in y and x and of `sections` in z: the slab's own with
    the halo, where the volume's ends and bad sections are replaced already.

    The slab is computed tile by tile on the lattice, so that a voxel is the same whichever slab contains it (law 1).
    The `caches` that the slab before in z left save encoding its sections again; the bytes are the same with and
    without them.

    Raises TooLargeError where the device has no memory for a tile, DataError where the network makes values that are no
    numbers.
    """
    return begin(network, lr, sections, slab, caches).finish()


def pad_laterally(voxels: NDArray[np.uint8], have: Box, want: Box, mode: str) -> NDArray[np.uint8]:
    """The voxels of `want` in y and x, of which `voxels` (D, h, w) are the real ones, those of `have`.

    Voxels outside `have` are invented: `mirror` reflects about the volume's face, the end voxel twice, as often as it
    takes; `edge` repeats the end voxel.
    """
    rows = _sources(want.start.y, want.stop.y, have.start.y, have.stop.y, mode)
    cols = _sources(want.start.x, want.stop.x, have.start.x, have.stop.x, mode)
    padded: NDArray[np.uint8] = voxels[:, rows][:, :, cols]
    return padded


def _sources(start: int, stop: int, low: int, high: int, mode: str) -> NDArray[np.intp]:
    i, n = np.arange(start, stop) - low, high - low
    if mode == "edge":
        return np.clip(i, 0, n - 1)
    i = np.mod(i, 2 * n)
    return np.where(i < n, i, 2 * n - 1 - i)


def _laterally(want: Box, have: Box) -> Box:
    return Box(ZYX(have.start.z, want.start.y, want.start.x), ZYX(have.stop.z, want.stop.y, want.stop.x))


def _crop(want: Box, have: Box) -> tuple[slice, slice, slice]:
    return have.intersect(_laterally(want, have)).slices(have.start)
