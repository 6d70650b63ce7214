"""Whether a tile gives the same bytes when it is computed again, and at another place of a batch beside other tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models import vectors
from pipeline.base.geometry import ZYX, Box
from pipeline.inference.network import Network
from pipeline.inference.tiles import super_resolve
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Slab
from pipeline.selftest.findings import SameFound


def strip(spec: NetworkSpec, first: int, cells: int, depth: int = 1) -> tuple[NDArray[np.uint8], Slab]:
    """A slab of `depth` sections and one row of cells, `first` and the `cells` - 1 after it, and its LR voxels, as
    `super_resolve` takes them.

    A voxel does not depend on which strip it is in: strips that overlap show the same tissue there.
    """
    lattice = spec.lattice
    start, shape = ZYX(lattice.z_halo, 0, first * lattice.cell), ZYX(depth, lattice.cell, cells * lattice.cell)
    lr = Box.at(start, shape)
    read = lattice.with_halo(lr)
    slab = Slab(0, lr, read, lr.lateral(spec.scale))
    return vectors.voxels(list(read.start), list(read.shape)), slab


def check(network: Network) -> SameFound:
    """Strips of as many cells as a batch has tiles, at least two, computed twice, and once moved on by one cell: every
    tile but the first is then at the place before its own.

    Raises DataError where the network makes values that are no numbers, TooLargeError.
    """
    spec = network.spec
    cells, side = max(2, spec.batch), spec.lattice.cell * spec.scale
    sections = range(spec.lattice.window)

    def sr(first: int, numbers: Sequence[int] = sections) -> NDArray[np.uint8]:
        lr, slab = strip(spec, first, cells)
        return super_resolve(network, lr, numbers, slab)

    once, again, moved = sr(0), sr(0), sr(1)
    return SameFound(
        spec.precision,
        twice=bool(np.array_equal(once, again)),
        other_place=bool(np.array_equal(once[:, :, side:], moved[:, :, :-side])),
    )
