"""A sharded precomputed level in which absent chunks are errors.

tensorstore (0.1.86) reads a chunk that no shard holds as zeros. So every chunk that reads as nothing but zeros is
looked up in its shard file: it is there if it is really black.
"""

from __future__ import annotations

import struct
from typing import Any

import tensorstore as ts

from pipeline.base.errors import MissingChunkError, SourceError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.base.waits import waiting
from pipeline.storage import kv
from pipeline.storage.precomputed_morton import chunk_number
from pipeline.storage.sources.voxel_array import Level, Pending, VoxelArray, Voxels, first_line, open_array


def open_sharded(level: Level, sharding: dict[str, Any], key: str) -> VoxelArray:
    """The level, opened. `key` is the scale's, `sharding` as in the info.

    Raises SourceError where tensorstore refuses them.
    """
    return _ShardedArray(level, open_array(level), shard_store(level, sharding, key))


def shard_store(level: Level, sharding: dict[str, Any], key: str) -> ts.KvStore:
    """The level's chunks by `stored_name`. Raises SourceError where tensorstore refuses the sharding."""
    base = kv.spec(level.url)
    base |= {"path": f"{base['path']}{key}/"}
    spec = {"driver": "neuroglancer_uint64_sharded", "base": base, "metadata": sharding}
    try:
        return ts.KvStore.open(spec, context=kv.context()).result()
    except Exception as error:
        raise SourceError(
            f"{level.place} cannot be read: {first_line(error)}",
            "sharding that tensorstore reads",
            "Write the volume again",
        ) from error


def stored_name(level: Level, position: ZYX) -> bytes:
    """tensorstore's key, in a store of shards, of the chunk at this position of the grid: its number in 8 bytes."""
    return struct.pack(">Q", chunk_number(level.bounds.shape.ceil_div(level.chunk), position))


class _ShardedArray:
    """A level through tensorstore, with zeros looked up in `shards`. Safe to use from several threads."""

    def __init__(self, level: Level, array: VoxelArray, shards: ts.KvStore) -> None:
        self._level, self._array, self._shards = level, array, shards

    def start(self, box: Box) -> Pending:
        pending = self._array.start(box)

        def wait() -> Voxels:
            voxels = pending()
            self._look_up_zeros(voxels, box)
            return voxels

        return wait

    def _look_up_zeros(self, voxels: Voxels, box: Box) -> None:
        chunk, origin = self._level.chunk, self._level.bounds.start
        here = box.shift(ZYX(0, 0, 0) - origin)
        zeros = [part.start // chunk for part in grid_parts(here, chunk) if not voxels[part.slices(here.start)].any()]
        for position, found in [(p, self._shards.read(stored_name(self._level, p))) for p in zeros]:
            try:
                with waiting(f"{self._level.place} at chunk {position}"):
                    stored = found.result().state == "value"
            except Exception as error:
                raise kv.classify(error, f"{self._level.place} at chunk {position}") from error
            if not stored:
                raise MissingChunkError(f"{self._level.place}: chunk {position} of the grid (z, y, x) is in no shard")
