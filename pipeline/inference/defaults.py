"""What volume.yaml does not say of a network: its lattice by the volume, precision and batch by what workers have.

Pure functions; no torch. The lattice follows from the volume's sides alone, and no default from box, slab or number of
workers, so that a voxel is the same however the work is cut (law 1).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import models
from pipeline.base.geometry import Box
from pipeline.config.volume import NetworkConfig
from pipeline.inference.footprint import footprint
from pipeline.plan.lattice import Lattice
from pipeline.plan.network_spec import NetworkSpec
from pipeline.process.device import Facts

MAX_ONE_CELL = 128
"""A volume that one cell of at most so many LR voxels covers is one tile, without a halo: nothing lies beyond it."""
CELLS = (64, 128)
"""The cells that others choose from; the sides of usual slabs are multiples of both."""
FILLING_VOXELS = 8 * 96 * 96
"""LR voxels of tiles that keep a GPU busy when they are computed at once."""
MAX_BATCH = 64
MAX_MEMORY_SHARE = 0.6
"""So much of a GPU's memory may a batch take by formula: the rest is for weights and the caches of a slab's tiles."""


def lattice_for(network: NetworkSpec, stated: NetworkConfig, bounds: Box) -> Lattice:
    """The lattice of a volume with these bounds; what is `stated` stays.

    Networks without weights keep their own, which is exact whatever the cell.
    """
    own, traits = network.lattice, models.NETWORKS[network.name]
    if stated.cell is not None or not traits.weights:
        return own
    one = next((cell for cell in range(8, MAX_ONE_CELL + 1, 8) if replace(own, cell=cell).tiles(bounds) == 1), None)
    if one is not None:
        return replace(own, cell=one, halo=traits.min_halo if stated.halo is None else own.halo)
    return min((replace(own, cell=cell) for cell in CELLS), key=lambda each: each.tiles(bounds) * each.tile**2)


def undecided(stated: NetworkConfig) -> bool:
    """Whether `for_workers` has anything to choose."""
    return models.NETWORKS[stated.name].weights and (stated.precision is None or stated.batch is None)


def for_workers(network: NetworkSpec, stated: NetworkConfig, bounds: Box, workers: Collection[Facts]) -> NetworkSpec:
    """The network with the precision and batch that suit these workers; what is `stated` stays."""
    if not undecided(stated):
        return network
    network = replace(network, precision=stated.precision or precision_for(workers), batch=1)
    return replace(network, batch=stated.batch or batch_for(network, bounds, workers))


def precision_for(workers: Collection[Facts]) -> str:
    """TF32 where every worker has it, else float32, which every device has."""
    return "tf32" if workers and all("tf32" in worker.precisions for worker in workers) else "float32"


def batch_for(network: NetworkSpec, bounds: Box, workers: Collection[Facts]) -> int:
    """How many tiles are computed at once: 1 where a CPU computes, else enough to fill a GPU.

    It is a power of two, no more than fit the least memory, and no more than cover a section of the volume: the tiles
    of a small one would be computed over and over.
    """
    if not workers or any(worker.kind.startswith("cpu") for worker in workers):
        return 1
    wanted = min(network.lattice.tiles(bounds), -(-FILLING_VOXELS // network.lattice.tile**2), MAX_BATCH)
    room = MAX_MEMORY_SHARE * min(worker.memory_bytes for worker in workers)
    batch = 1 << (wanted - 1).bit_length()
    while batch > 1 and _batch_bytes(replace(network, batch=batch)) > room:
        batch //= 2
    return batch


def _batch_bytes(network: NetworkSpec) -> int:
    held = footprint(network, gpu=True)
    return held.tile_bytes + held.cached_bytes(network.batch)
