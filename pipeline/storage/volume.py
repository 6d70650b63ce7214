"""What a source and a target are, whatever their format: two protocols, and what a source says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.base.geometry import ZYX, Box
from pipeline.plan.target_spec import TargetSpec

Uint8Array = NDArray[np.uint8]
Encoded = bytes | memoryview
"""What is stored under a key."""


@dataclass(frozen=True)
class VolumeInfo:
    """What a source's metadata says, in (z, y, x) order.

    `bounds` are the voxels that exist, in volume coordinates (a precomputed volume's voxel_offset is its start, 0
    elsewhere). `corner_nm` is the physical position of the lower corner of voxel (0, 0, 0) of that grid. OME-NGFF puts
    a voxel's *centre* at its translation, so there corner = translation - voxel_size / 2; the other formats put the
    corner at 0. `sized` and `placed` tell whether the metadata states voxel size and position: where not, they are
    somebody's assumption. `notes` is what its metadata say that the user is to be told, a line each, and `zyx` the
    indices of the stored array's axes z, y, x. `unstored` is the grey value of the volume's own fill value, which
    stands for chunks that many writers leave out; None where it has none.
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
    sized: bool = True
    placed: bool = True
    notes: tuple[str, ...] = ()
    zyx: tuple[int, int, int] = (0, 1, 2)
    unstored: int | None = None


class Source(Protocol):
    """An opened source volume."""

    @property
    def info(self) -> VolumeInfo: ...

    def read(self, box: Box) -> Uint8Array:
        """The voxels of `box` (inside info.bounds), uint8 (z, y, x).

        Raises MissingChunkError, DamagedChunkError (both final) or TransientError; voxels that are not stored are those
        of a stated fill.
        """
        ...


class Target(Protocol):
    """An opened target. Boxes are in voxels of the level's own array, which starts at (0, 0, 0)."""

    @property
    def spec(self) -> TargetSpec: ...

    def create(self) -> None:
        """Write the metadata objects; the same bytes again where they are already there."""
        ...

    def damaged_metadata(self) -> dict[str, str]:
        """What is wrong with the stored metadata objects, by key."""
        ...

    def refuse_foreign(self) -> None:
        """Raises TargetError where the metadata at the target's place are those of another volume.

        What is neither this target's nor readable is damage, and so are this target's own objects in each other's
        place, or with a few bytes changed.
        """
        ...

    def metadata(self) -> dict[str, bytes]:
        """The metadata objects that `create` writes, key -> bytes: a function of the spec alone."""
        ...

    def encode(self, level: int, box: Box, voxels: Uint8Array) -> Mapping[str, Encoded]:
        """The stored objects (key -> bytes) of `box`, which covers whole shards or ends at the array's end. No I/O."""
        ...

    def keys(self, level: int, box: Box) -> list[str]:
        """The keys that `encode` of this box gives, sorted, without encoding."""
        ...

    def put(self, objects: Mapping[str, Encoded]) -> None:
        """Returns when all objects are durable. Each appears whole or not at all."""
        ...

    def get(self, keys: list[str]) -> Iterator[tuple[str, bytes | None]]:
        """Stored bytes of these keys in turn, None where an object is absent. A few of them are in memory at a time."""
        ...

    def locate(self, key: str) -> tuple[int, ZYX] | None:
        """The level and the first voxel of the shard that is stored under this key; None where no shard is."""
        ...

    def read(self, level: int, box: Box, absent: int | None = None) -> Uint8Array:
        """Decoded voxels. A missing shard is MissingChunkError, or filled with `absent` where that is given."""
        ...
