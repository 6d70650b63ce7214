"""Chunks of a sharded precomputed scale into shard files, and the question whether a chunk is in its file.

Both are here because tensorstore's own sharded arrays (0.1.86) leave out chunks of nothing but zeros and read a chunk that is not there as zeros,
whatever `store_data_equal_to_fill_value` and `fill_missing_data_reads` say. So chunks are encoded as if unsharded, and packed by tensorstore's
key-value store of shards, which stores what it is given.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import tensorstore as ts

from pipeline.base.geometry import ZYX, Box, tiles
from pipeline.storage import kv
from pipeline.storage.precomputed_morton import chunk_number
from pipeline.storage.volume import LevelSpec


@dataclass(frozen=True)
class ShardFiles:
    """The shard files of one scale: `folder` below the volume's url, `sharding` as in its info, `chunk_key` the unsharded name of a chunk."""

    level: LevelSpec
    folder: str
    sharding: dict[str, Any]
    chunk_key: Callable[[ZYX], str]

    def pack(self, box: Box, chunks: dict[str, bytes]) -> dict[str, bytes]:
        """The shard files (key -> bytes) of `box`, which is whole shards, from its encoded chunks by their unsharded keys."""
        context = private_context()
        shards = self._open({"driver": "memory", "path": self.folder}, context)
        # In one transaction every file is made once, not once per chunk that arrives.
        with ts.Transaction() as transaction:
            files = shards.with_transaction(transaction)
            positions = (tile.start // self.level.chunk for tile in tiles(box, self.level.chunk))
            for written in [
                files.write(self._name(position), chunks[self.chunk_key(position)]) for position in positions
            ]:
                written.result()
        return stored_objects(context)

    def lacks(self, url: str, positions: Iterable[ZYX]) -> list[ZYX]:
        """Those of the chunks at these grid positions that are stored in no file of the volume at `url`."""
        base = kv.spec(url)
        shards = self._open(base | {"path": base["path"] + self.folder}, kv.context())
        found = [(position, shards.read(self._name(position))) for position in positions]
        return [position for position, future in found if future.result().state != "value"]

    def _open(self, base: dict[str, Any], context: ts.Context) -> ts.KvStore:
        return ts.KvStore.open(
            {"driver": "neuroglancer_uint64_sharded", "base": base, "metadata": self.sharding}, context=context
        ).result()

    def _name(self, position: ZYX) -> bytes:
        """tensorstore's key of a chunk in shards: its number, 8 bytes, highest first."""
        return struct.pack(">Q", chunk_number(self.level.shape.ceil_div(self.level.chunk), position))


def private_context() -> ts.Context:
    """A memory store of the caller's own, on this process's threads. No cache, which would keep dead stores alive."""
    return ts.Context({"memory_key_value_store": {}, "cache_pool": {}}, kv.context())


def stored_objects(context: ts.Context) -> dict[str, bytes]:
    """All objects of a private_context's memory store, sorted by key. Each leaves the store as it is taken: none is held twice."""
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    objects = {}
    for key in sorted(store.list().result()):
        objects[key.decode()] = bytes(store.read(key).result().value)
        store.write(key, None).result()
    return objects
