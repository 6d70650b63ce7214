"""What a source and a target are to the rest of the house: the two contracts, free of any file format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.base.geometry import ZYX, Box
from pipeline.plan.plan import LevelSpec as LevelSpec

Uint8Array = NDArray[np.uint8]


@dataclass(frozen=True)
class VolumeInfo:
    """What a source's metadata says, in (z, y, x) order.

    `bounds` are the voxels that exist, in volume coordinates (a precomputed volume's voxel_offset is its start, 0 elsewhere).
    `corner_nm` is the physical position of the lower corner of voxel (0, 0, 0) of that grid. OME-NGFF puts a voxel's
    *centre* at its translation, so there corner = translation - voxel_size / 2; the other formats put the corner at 0.
    """

    url: str
    format: str
    bounds: Box
    voxel_size_nm: tuple[float, float, float]
    corner_nm: tuple[float, float, float]
    dtype: str
    chunk_shape: ZYX
    fingerprint: str
    reader: str = "tensorstore"


class Source(Protocol):
    """An opened source volume."""

    @property
    def info(self) -> VolumeInfo: ...

    def read(self, box: Box) -> Uint8Array:
        """The voxels of `box` (inside info.bounds), uint8 (z, y, x).

        Raises MissingChunkError, DamagedChunkError (both final) or TransientError; never returns invented voxels.
        """
        ...


@dataclass(frozen=True)
class TargetSpec:
    """Everything that fixes the bytes of a target's metadata; nothing about how the work is cut or who does it.

    `levels[k]` is mip k, each laterally half of the one before. `fidelity` is the LR-sized volume beside them, or None.
    `corner_nm` is the lower corner of SR voxel (0, 0, 0) of mip 0; `voxel_size_nm` is that of mip 0; `scale` is SR over LR.
    `provenance` is plain JSON (config, version, network, weights, lattice, source).
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


FIDELITY = -1
"""The `level` by which the fidelity volume is named in calls that take a level."""


class Target(Protocol):
    """An opened target. Boxes are in voxels of the level's own array, which starts at (0, 0, 0)."""

    @property
    def spec(self) -> TargetSpec: ...

    def create(self) -> None:
        """Write the metadata objects; the same bytes again where they are already there."""
        ...

    def encode(self, level: int, box: Box, voxels: Uint8Array) -> dict[str, bytes]:
        """The stored objects (key -> bytes) of `box`, which covers whole shards or ends at the array's end. No I/O."""
        ...

    def keys(self, level: int, box: Box) -> list[str]:
        """The keys that `encode` of this box gives, sorted, without encoding."""
        ...

    def put(self, objects: dict[str, bytes]) -> None:
        """Returns when all objects are durable. Each appears whole or not at all."""
        ...

    def get(self, keys: list[str]) -> dict[str, bytes | None]:
        """Stored bytes of these keys, None where an object is absent."""
        ...

    def read(self, level: int, box: Box, absent: int | None = None) -> Uint8Array:
        """Decoded voxels. A missing shard is MissingChunkError, or filled with `absent` where that is given."""
        ...
