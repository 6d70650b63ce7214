"""What a network holds beside its weights, by formula, and the message where a device has less. Imports no torch."""

from __future__ import annotations

import dataclasses

import models
from pipeline.base.errors import TooLargeError
from pipeline.base.geometry import Box
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.price import Footprint


def footprint(spec: NetworkSpec, gpu: bool = False) -> Footprint:
    """The bytes for the tiles that are computed at once, and for the encoded sections of one. On a `gpu`, the CUDA
    graph that fuses windows has one window's sections of its own.
    """
    maps, section = models.held_bytes(spec.name, spec.scale, spec.preset, spec.lattice.tile, spec.precision, gpu)
    window = spec.lattice.window * section
    kept = models.WARM_BYTES if spec.preset is not None else 0
    landing = spec.batch * (spec.scale * spec.lattice.cell) ** 2
    return Footprint(spec.batch * (maps + gpu * window) + kept, window, spec.batch, landing, pinned=gpu)


def needed_bytes(spec: NetworkSpec, slab: Box, gpu: bool = False) -> int:
    """Bytes beside the weights for one slab at a time; `slab` is its box of LR voxels."""
    held = footprint(spec, gpu)
    return held.tile_bytes + held.cached_bytes(spec.lattice.tiles(slab))


def too_large(spec: NetworkSpec, slab: Box, available: int, gpu: bool = False) -> TooLargeError:
    """The error where `available` bytes beside the weights are less than a slab needs. It names the largest batch that
    fits, or cell where none does.
    """

    def fits_in(smaller: NetworkSpec) -> bool:
        return needed_bytes(smaller, slab, gpu) <= available

    lattice, needed = spec.lattice, needed_bytes(spec, slab, gpu)
    batches = (dataclasses.replace(spec, batch=batch) for batch in range(spec.batch - 1, 0, -1))
    batch = next((s.batch for s in batches if fits_in(s)), None)
    smaller = (
        dataclasses.replace(spec, lattice=dataclasses.replace(lattice, cell=cell), batch=1)
        for cell in range(lattice.cell - 8, 0, -8)
    )
    fits = next((s.lattice.cell for s in smaller if fits_in(s)), None)
    count = "a tile" if spec.batch == 1 else f"{spec.batch} tiles at once"
    saw = (
        f"network.cell {lattice.cell} with halo {lattice.halo}: {count} of {lattice.tile} x {lattice.tile} LR voxels, "
        f"with the encoded sections of its slab, needs {needed / 1e9:.2f} GB beside the weights, "
        f"and {available / 1e9:.2f} GB are there"
    )
    if batch is None and fits is None:
        return TooLargeError(saw, "a tile that fits", "Take another device, or a smaller work.slab_shape")
    alone = "" if spec.batch == 1 else " and network.batch 1"
    wanted = f"network.batch {batch} or less" if batch else f"network.cell {fits} or less, with the same halo{alone}"
    return TooLargeError(saw, wanted, "Set it, with another target.url; or free memory there")
