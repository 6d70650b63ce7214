"""Packs the chunks of a sharded precomputed scale into shard files, and checks whether a chunk is in its file.

tensorstore's own sharded arrays (0.1.86) leave out chunks of nothing but zeros and read an absent chunk as zeros,
whatever `store_data_equal_to_fill_value` and `fill_missing_data_reads` are. So chunks are encoded as if unsharded, and
packed by tensorstore's key-value store of shards, which stores every chunk.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import tensorstore as ts

from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.base.waits import waiting
from pipeline.plan.target_spec import LevelSpec
from pipeline.storage import kv
from pipeline.storage.precomputed_morton import chunk_number


@dataclass(frozen=True)
class ShardFiles:
    """The shard files of one scale.

    They lie in `folder`, below the volume's url. `sharding` is that of the scale in the info file, and `chunk_key`
    gives the key that a chunk at a grid position has in an unsharded scale.
    """

    level: LevelSpec
    folder: str
    sharding: dict[str, Any]
    chunk_key: Callable[[ZYX], str]

    def pack(self, box: Box, chunks: dict[str, bytes]) -> dict[str, bytes]:
        """The shard files (key -> bytes) of `box`, whole shards, from its encoded chunks by their unsharded keys."""
        context = private_context()
        shards = self._open({"driver": "memory", "path": self.folder}, context)
        # In one transaction every file is made once, not once per chunk that arrives.
        with ts.Transaction() as transaction:
            files = shards.with_transaction(transaction)
            positions = (tile.start // self.level.chunk for tile in grid_parts(box, self.level.chunk))
            for written in [
                files.write(self.name(position), chunks[self.chunk_key(position)]) for position in positions
            ]:
                written.result()
        return stored_objects(context)

    def lacks(self, url: str, positions: Iterable[ZYX]) -> list[ZYX]:
        """Those grid positions (z, y, x) whose chunks are in no shard file of the volume at `url`."""
        shards = self.open_at(url)
        found = [(position, shards.read(self.name(position))) for position in positions]
        with waiting(f"{url}/{self.folder}"):
            return [position for position, future in found if future.result().state != "value"]

    def open_at(self, url: str) -> ts.KvStore:
        """The chunks of the volume at `url`, by `name`."""
        base = kv.spec(url)
        return self._open(base | {"path": base["path"] + self.folder}, kv.context())

    def _open(self, base: dict[str, Any], context: ts.Context) -> ts.KvStore:
        return ts.KvStore.open(
            {"driver": "neuroglancer_uint64_sharded", "base": base, "metadata": self.sharding}, context=context
        ).result()

    def name(self, position: ZYX) -> bytes:
        """tensorstore's key of a chunk in shards: the chunk's number in 8 bytes, big endian."""
        return struct.pack(">Q", chunk_number(self.level.shape.ceil_div(self.level.chunk), position))


def private_context() -> ts.Context:
    """A context with a memory store of its own, on this process's threads.

    It has no cache, which would keep it alive.
    """
    return ts.Context({"memory_key_value_store": {}, "cache_pool": {}}, kv.context())


def stored_objects(context: ts.Context) -> dict[str, bytes]:
    """All objects of a private_context's memory store, sorted by key.

    Each is deleted from the store as it is read, so that memory never holds two copies of all.
    """
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    objects = {}
    for key in sorted(store.list().result()):
        objects[key.decode()] = bytes(store.read(key).result().value)
        store.write(key, None).result()
    return objects
