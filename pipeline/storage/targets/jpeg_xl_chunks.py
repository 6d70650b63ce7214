"""A precomputed target's chunks as JPEG XL images: encoded, and read back."""

from __future__ import annotations

import json
from collections.abc import Callable

import tensorstore as ts

from pipeline.base.errors import TargetError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.plan.target_spec import LevelSpec
from pipeline.storage import kv
from pipeline.storage.chunk_array import ChunkArray
from pipeline.storage.jpeg_xl import decode, encode
from pipeline.storage.targets.precomputed_shard_files import ShardFiles
from pipeline.storage.volume import Uint8Array


def encode_chunks(level: LevelSpec, key: Callable[[ZYX], str], box: Box, voxels: Uint8Array) -> dict[str, bytes]:
    """The chunks of `box`, whole chunks or up to the array's end, by their keys in an unsharded scale; sorted."""
    parts = {key(part.start // level.chunk): part.slices(box.start) for part in grid_parts(box, level.chunk)}
    return {name: encode(voxels[part]) for name, part in sorted(parts.items())}


def open_chunks(
    url: str, folder: str, scale: str, level: LevelSpec, key: Callable[[ZYX], str], shard_files: ShardFiles | None
) -> ChunkArray:
    """The stored level as (z, y, x) from (0, 0, 0). Its info lies in `folder` below the url, and calls it `scale`.

    Raises TargetError where it is absent or of another shape, TransientError or UserError of the store.
    """
    what = f"{url}/{folder}{scale}"
    try:
        scales = json.loads(kv.Store(url).get(f"{folder}info") or b"{}").get("scales", [])
        found = next((each for each in scales if each["key"] == scale), None)
    except (ValueError, TypeError, KeyError, AttributeError):
        found = None  # damaged
    if found is None:
        raise TargetError(
            f"target {what} cannot be opened", "the array that the plan describes", "Create the target first"
        )
    if found.get("size") != list(level.shape)[::-1]:
        raise TargetError(
            f"target {what} holds an array of {found.get('size')} (x, y, z)",
            f"{level.shape} (z, y, x)",
            "Give another target url",
        )
    name: Callable[[ZYX], str | bytes] = key if shard_files is None else shard_files.name
    if shard_files is None:
        store = ts.KvStore.open(kv.spec(url), context=kv.context()).result()
    else:
        store = shard_files.open_at(url)
    return ChunkArray(what, Box(ZYX(0, 0, 0), level.shape), level.chunk, "uint8", store, name, decode)
