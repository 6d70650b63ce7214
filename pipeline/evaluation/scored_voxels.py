"""Which voxels of SR are scored: not those that its run skipped, nor those where a mask is 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import LedgerError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.plan.plan import Plan
from pipeline.plan.receipt import QUARANTINED, SKIPPED, WRITTEN
from pipeline.prepare import recorded
from pipeline.storage.ledger import Ledger
from pipeline.storage.volume import Source, VolumeInfo

Valid = NDArray[np.bool_]


@dataclass(frozen=True)
class Written:
    """What the ledger beside an SR volume says of its slabs. Boxes are in SR's voxels, counted from its first."""

    plan: Plan
    ledger: Ledger
    left_empty: frozenset[int]

    def check(self, name: str, box: Box) -> None:
        """Raises UserError where a slab in `box` is neither written nor skipped."""
        wanted = [i for z in range(box.start.z, box.stop.z, self.plan.slab_shape.z) for _, i in self._slabs(z, box)]
        wanted += [i for _, i in self._slabs(box.stop.z - 1, box)]
        given_up = sorted({i for i in wanted if self.ledger.state(i) == QUARANTINED})
        if given_up:
            raise UserError(
                f"{name}: {len(given_up)} slabs of SR are quarantined; the first is task {given_up[0]}, "
                f"{self.plan.describe(given_up[0])}: {self.ledger.why(given_up[0]).first_line}",
                "a run that is done",
                "Mend the cause and run again, or leave these sections out by sections",
            )
        left = {i for i in wanted if self.ledger.state(i) not in (WRITTEN, SKIPPED)}
        if left:
            raise UserError(
                f"{name}: SR's run is not finished: {len(left)} of the {len(set(wanted))} slabs to score are pending",
                "a run that is done",
                "Run the same command again, or leave these sections out by sections",
            )

    def parts(self, z: int, box: Box) -> Iterator[Box]:
        """The parts of section `z` of `box` that were made, a box for each slab; none of a bad section left empty."""
        if z in self.left_empty:
            return
        for part, index in self._slabs(z, box):
            if self.ledger.state(index) == WRITTEN:
                yield part

    def _slabs(self, z: int, box: Box) -> Iterator[tuple[Box, int]]:
        """Section `z` of `box`, cut as slabs are, with the number of each."""
        size, grid = self.plan.slab_shape.lateral(self.plan.scale), self.plan.grid
        for iy in range(box.start.y // size.y, -(-box.stop.y // size.y)):
            for ix in range(box.start.x // size.x, -(-box.stop.x // size.x)):
                slab = Box(ZYX(z, iy * size.y, ix * size.x), ZYX(z + 1, (iy + 1) * size.y, (ix + 1) * size.x))
                yield slab.intersect(box), (iy * grid.x + ix) * grid.z + z // size.z


def written(sr: VolumeInfo) -> Written | None:
    """What the run that wrote SR recorded; None where nothing is recorded beside it, or of a volume of another shape.

    Raises LedgerError where its plan is damaged.
    """
    try:
        found = recorded.read(sr.url, "evaluate")
    except LedgerError:
        raise
    except UserError:
        return None  # a store that may be read but not listed refuses to tell what is absent
    if found is None or found.plan.levels[0].shape != sr.bounds.shape:
        return None
    return Written(found.plan, found.ledger, found.left_empty)


def masked(mask: Source, sr: VolumeInfo, z: int, box: Box) -> Valid:
    """Where the mask is not 0, for section `z` of `box` in SR's voxels from its first, (y, x). It is 0 outside its
    bounds.
    """
    picked = []
    for axis, span in enumerate((range(z, z + 1), range(box.start.y, box.stop.y), range(box.start.x, box.stop.x))):
        first = sr.corner_nm[axis] + tuple(sr.bounds.start)[axis] * sr.voxel_size_nm[axis]
        centres = first + (np.arange(span.start, span.stop) + 0.5) * sr.voxel_size_nm[axis]
        picked.append(
            np.floor((centres - mask.info.corner_nm[axis]) / mask.info.voxel_size_nm[axis] + 1e-6).astype(np.int64)
        )
    touched = Box.of([int(p.min()) for p in picked], [int(p.max()) + 1 for p in picked]).intersect(mask.info.bounds)
    valid = np.zeros((len(picked[1]), len(picked[2])), np.bool_)
    if touched.empty:
        return valid
    voxels = mask.read(touched)[0]
    rows, columns = (
        np.flatnonzero((p >= low) & (p < high))
        for p, low, high in zip(
            picked[1:], (touched.start.y, touched.start.x), (touched.stop.y, touched.stop.x), strict=True
        )
    )
    valid[np.ix_(rows, columns)] = (
        voxels[np.ix_(picked[1][rows] - touched.start.y, picked[2][columns] - touched.start.x)] != 0
    )
    return valid
