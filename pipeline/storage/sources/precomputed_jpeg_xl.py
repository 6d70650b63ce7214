"""A precomputed level whose chunks are JPEG XL images, in files of their own or in shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorstore as ts

from pipeline.base.geometry import ZYX
from pipeline.storage import jpeg_xl, kv
from pipeline.storage.chunk_array import ChunkArray
from pipeline.storage.sources.cloud_volume_array import chunk_name
from pipeline.storage.sources.precomputed_sharded_array import shard_store, stored_name
from pipeline.storage.sources.voxel_array import Level


def open_jpeg_xl(level: Level, sharding: dict[str, Any] | None, key: str) -> ChunkArray:
    """The level, opened. `key` is the scale's, `sharding` as in the info. Raises SourceError where tensorstore refuses
    that.
    """
    name: Callable[[ZYX], str | bytes]
    if sharding is not None:
        store, name = shard_store(level, sharding, key), partial(stored_name, level)
    else:
        folder = kv.spec(level.url)
        store = ts.KvStore.open(folder | {"path": f"{folder['path']}{key}/"}, context=kv.context()).result()
        name = partial(chunk_name, level)
    decode = partial(jpeg_xl.decode, dtype=level.dtype)
    return ChunkArray(level.place, level.bounds, level.chunk, level.dtype, store, name, decode)
