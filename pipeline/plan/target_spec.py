"""What a target is, as values: the shapes of its levels, and everything else that fixes the bytes of its metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.base.geometry import ZYX

FIDELITY = -1
"""The number that stands for the fidelity volume where a function takes a level."""


@dataclass(frozen=True)
class LevelSpec:
    """One stored array: shape, chunk and shard in voxels. Where shard equals chunk, the array is not sharded.

    Its coordinates start at (0, 0, 0).
    """

    shape: ZYX
    chunk: ZYX
    shard: ZYX


@dataclass(frozen=True)
class TargetSpec:
    """Everything that fixes the bytes of a target's metadata, and nothing about how the work is cut or who does it.

    `levels[k]` is mip k, each laterally half of the one before. `fidelity` is the LR-sized volume beside them, or None.
    `voxel_size_nm` is that of mip 0, `corner_nm` the lower corner of its voxel (0, 0, 0), both (z, y, x); `scale` is SR
    over LR. `provenance` is plain JSON: version, network, weights, lattice, source. `name` is what OME-Zarr calls the
    volume; the default is what earlier commits called every one.
    """

    url: str
    format: str
    encoding: str
    scale: int
    voxel_size_nm: tuple[float, float, float]
    corner_nm: tuple[float, float, float]
    levels: tuple[LevelSpec, ...]
    fidelity: LevelSpec | None
    provenance: dict[str, Any] = field(default_factory=dict, hash=False)
    name: str = "emsr"
