"""Packs the chunks of a sharded Zarr array into shards, with the bytes that tensorstore's own sharded arrays have.

tensorstore (0.1.86) keeps the chunks of a shard until all are there, in pieces of 4 KiB, and hands the shard over as
one more copy: memory that the system must clear page by page, which costs a third of what encoding costs. Here it
encodes a few chunks at a time, into memory that is used again, and each is copied once, to its place in the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.base.waits import heartbeat
from pipeline.plan.target_spec import LevelSpec
from pipeline.storage.targets.precomputed_shard_files import private_context
from pipeline.storage.volume import Encoded, Uint8Array

AT_ONCE_BYTES = 2 << 20
"""Voxels encoded at a time, but at least one chunk. More of them make the heap give pages back and take them anew."""
_ABSENT = 2**64 - 1
"""Offset and size of a chunk that a shard does not hold: it lies beyond the array's end."""


@dataclass(frozen=True)
class ZarrShards:
    """The shards of one array.

    `chunks` is the metadata of an array of the same chunks without shards, `index_codecs` are the codecs of a shard's
    index, which lies at its end. `key` gives the object's key of the shard at a position in the grid of shards.
    """

    level: LevelSpec
    chunks: dict[str, Any]
    index_codecs: list[dict[str, Any]]
    key: Callable[[ZYX], str]

    def encode(self, box: Box, voxels: Uint8Array) -> Mapping[str, Encoded]:
        """The shards (key -> bytes) of `box`, which is whole shards, sorted by key. `voxels` are those of `box`."""
        context = private_context()
        chunks, store = _array("chunks", self.chunks, context), ts.KvStore.open("memory://", context=context).result()
        objects: dict[str, Encoded] = {}
        for shard in grid_parts(box, self.level.shard):
            heartbeat()
            objects[self.key(shard.start // self.level.shard)] = self._shard(
                shard, voxels[shard.slices(box.start)], chunks, store
            )
        return dict(sorted(objects.items()))

    def _shard(self, shard: Box, voxels: Uint8Array, chunks: ts.TensorStore, store: ts.KvStore) -> memoryview:
        """Chunks in z, y, x order, then the index: offset and size of each."""
        chunk, in_chunks = self.level.chunk, self.level.shard // self.level.chunk
        index = np.full((*in_chunks, 2), _ABSENT, np.uint64)
        # More than any codec makes of voxels that it cannot compress. What is not needed is never touched.
        packed = np.empty(in_chunks.product * (chunk.product + chunk.product // 64 + 1024), np.uint8)
        size = 0
        columns = max(1, AT_ONCE_BYTES // chunk.product)
        for strip in grid_parts(shard, ZYX(chunk.z, chunk.y, columns * chunk.x)):
            chunks[strip.slices()].write(
                voxels[strip.slices(shard.start)], can_reference_source_data_indefinitely=True
            ).result()
            for tile in grid_parts(strip, chunk):
                value = _taken(store, "chunks", tile.start // chunk)
                index[tuple((tile.start - shard.start) // chunk)] = size, len(value)
                packed[size : size + len(value)] = value
                size += len(value)
        end = self._encoded(index)
        packed[size : size + len(end)] = end
        packed.resize(size + len(end), refcheck=False)  # gives back the address space of the rest
        return packed.data

    def _encoded(self, index: NDArray[np.uint64]) -> Uint8Array:
        """A shard's index as it is stored: an array of one chunk, with codecs of its own."""
        context = private_context()
        metadata = self.chunks | {
            "shape": list(index.shape),
            "data_type": "uint64",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(index.shape)}},
            "codecs": self.index_codecs,
        }
        del metadata["dimension_names"]
        _array("index", metadata, context).write(index).result()
        return _taken(ts.KvStore.open("memory://", context=context).result(), "index", (0,) * index.ndim)


def _array(folder: str, metadata: dict[str, Any], context: ts.Context) -> ts.TensorStore:
    """An array of these metadata in the context's memory store, whose chunks are stored even where they are zeros."""
    kvstore = {"driver": "memory", "path": f"{folder}/"}
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, open=True, assume_metadata=True, context=context).result()


def _taken(store: ts.KvStore, folder: str, position: Iterable[int]) -> Uint8Array:
    """The bytes of a chunk that `_array` stored, which is removed there."""
    key = "/".join([folder, "c", *map(str, position)])
    value = store.read(key).result().value
    store.write(key, None).result()
    return np.frombuffer(value, np.uint8)
