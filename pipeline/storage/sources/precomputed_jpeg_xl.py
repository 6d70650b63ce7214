"""A precomputed level whose chunks are JPEG XL images, in files of their own or in shards."""

from __future__ import annotations

from functools import partial
from typing import Any

import tensorstore as ts

from pipeline.storage import kv
from pipeline.storage.jpeg_xl import JpegXlArray
from pipeline.storage.sources.cloud_volume_array import chunk_name
from pipeline.storage.sources.precomputed_sharded_array import shard_store, stored_name
from pipeline.storage.sources.voxel_array import Level


def open_jpeg_xl(level: Level, sharding: dict[str, Any] | None, key: str) -> JpegXlArray:
    """The level, opened. `key` is the scale's, `sharding` as in the info. Raises SourceError where tensorstore refuses
    that.
    """
    if sharding is not None:
        store, name = shard_store(level, sharding, key), partial(stored_name, level)
        return JpegXlArray(level.place, level.bounds, level.chunk, level.dtype, store, name)
    folder = kv.spec(level.url)
    store = ts.KvStore.open(folder | {"path": f"{folder['path']}{key}/"}, context=kv.context()).result()
    return JpegXlArray(level.place, level.bounds, level.chunk, level.dtype, store, partial(chunk_name, level))
