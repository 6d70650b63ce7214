"""What a network holds beside its weights, by formula, and the message where a device has less. Imports no torch."""

from __future__ import annotations

import dataclasses

import models
from models.memory import WARM_BYTES
from pipeline.base.errors import TooLargeError
from pipeline.base.geometry import Box
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.price import Footprint


def footprint(spec: NetworkSpec) -> Footprint:
    """The bytes for the tiles that are computed at once, and for the encoded sections of one."""
    value_bytes = 2 if spec.precision in ("bfloat16", "float16") else 4
    tile, section = models.held_bytes(spec.name, spec.scale, spec.preset, spec.lattice.tile, value_bytes)
    maps = tile - WARM_BYTES if spec.batch > 1 else 0  # what a process keeps it keeps once
    return Footprint(tile + (spec.batch - 1) * maps, spec.lattice.window * section, spec.batch)


def needed_bytes(spec: NetworkSpec, slab: Box) -> int:
    """Bytes beside the weights for one slab at a time; `slab` is its box of LR voxels."""
    held = footprint(spec)
    return held.tile_bytes + held.cached_bytes(spec.lattice.tiles(slab))


def too_large(spec: NetworkSpec, slab: Box, available: int) -> TooLargeError:
    """The error where `available` bytes beside the weights are less than a slab needs. It names the largest batch that
    fits, or cell where none does.
    """
    lattice = spec.lattice
    batches = (dataclasses.replace(spec, batch=batch) for batch in range(spec.batch - 1, 0, -1))
    batch = next((s.batch for s in batches if needed_bytes(s, slab) <= available), None)
    smaller = (
        dataclasses.replace(spec, lattice=dataclasses.replace(lattice, cell=cell), batch=1)
        for cell in range(lattice.cell - 8, 0, -8)
    )
    fits = next((s.lattice.cell for s in smaller if needed_bytes(s, slab) <= available), None)
    count = "a tile" if spec.batch == 1 else f"{spec.batch} tiles at once"
    saw = (
        f"network.cell {lattice.cell} with halo {lattice.halo}: {count} of {lattice.tile} x {lattice.tile} LR voxels, "
        f"with the encoded sections of its slab, needs {needed_bytes(spec, slab) / 1e9:.2f} GB beside the weights, "
        f"and {available / 1e9:.2f} GB are there"
    )
    if batch is None and fits is None:
        return TooLargeError(saw, "a tile that fits", "Take another device, or a smaller work.slab_shape")
    alone = "" if spec.batch == 1 else " and network.batch 1"
    wanted = f"network.batch {batch} or less" if batch else f"network.cell {fits} or less, with the same halo{alone}"
    return TooLargeError(saw, wanted, "Set it, with another target.url; or free memory there")
