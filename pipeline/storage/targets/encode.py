"""Voxels encoded into stored objects in memory, and read back from the store: the part that both target formats share.

tensorstore writes a box of whole shards into a private memory store, and the objects there are returned as bytes. So
every object is encoded once and whole: nothing is read, merged or written in part, and its checksum is known before it
is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorstore as ts

from pipeline.base.errors import DamagedChunkError, MissingChunkError, TargetError, TransientError, UserError
from pipeline.base.geometry import ZYX, Box, chunk_count, grid_parts
from pipeline.base.waits import waiting
from pipeline.plan.target_spec import LevelSpec
from pipeline.storage import kv, requests
from pipeline.storage.targets.jpeg_xl_chunks import encode_chunks, open_chunks
from pipeline.storage.targets.precomputed_shard_files import ShardFiles, private_context, stored_objects
from pipeline.storage.targets.zarr_shard_files import ZarrShards
from pipeline.storage.volume import Encoded, Uint8Array

Reader = Callable[[Box], Uint8Array]
"""Gives the stored voxels of a box of an array. Raises MissingChunkError, DamagedChunkError, TransientError."""


@dataclass(frozen=True)
class StoredArray:
    """One array of a target.

    `folder` is where tensorstore opens it, below the target's url ("" or with a trailing slash). `stored` are the
    members of tensorstore's JSON for an array with stored metadata, `known` those that state the metadata, for
    encoding. `view` turns the opened array into (z, y, x) from (0, 0, 0). `key` gives the object's key, below the
    target's url, of the shard at a position (z, y, x) in the grid of shards; `position` is its reverse, None for a key
    that is not of the form of such keys. With `shard_files`, `known` describes single chunks, which are packed into
    shards afterwards. `zarr_shards` encodes shards of Zarr where there are any. `jpeg_xl` is the scale's key where its
    chunks are JPEG XL images, of which tensorstore knows nothing: `stored` and `known` are not used.
    """

    level: LevelSpec
    folder: str
    stored: dict[str, Any]
    known: dict[str, Any]
    view: Callable[[ts.TensorStore], ts.TensorStore]
    key: Callable[[ZYX], str]
    position: Callable[[str], ZYX | None]
    _: KW_ONLY
    shard_files: ShardFiles | None = None
    zarr_shards: ZarrShards | None = None
    jpeg_xl: str | None = None


def _check_whole_shards(level: LevelSpec, box: Box) -> None:
    inside = Box(ZYX(0, 0, 0), level.shape).contains(box) and not box.empty
    aligned = all(
        stop == end or stop % shard == 0 for stop, end, shard in zip(box.stop, level.shape, level.shard, strict=True)
    )
    if not inside or not aligned or any(box.start % level.shard):
        raise ValueError(f"box {box} is not made of whole shards of {level.shard} in an array of {level.shape}")


def keys(array: StoredArray, box: Box) -> list[str]:
    """The sorted keys of the objects of `box`. Raises ValueError where the box is not whole shards."""
    _check_whole_shards(array.level, box)
    shard = array.level.shard
    return sorted(array.key(piece.start // shard) for piece in grid_parts(box, shard))


def encode(array: StoredArray, box: Box, voxels: Uint8Array) -> Mapping[str, Encoded]:
    """Encode `voxels` (z, y, x), uint8, as the stored objects of `box`: key -> bytes, sorted by key.

    Raises ValueError where the box is not whole shards or the voxels are not of its shape.
    """
    _check_whole_shards(array.level, box)
    if voxels.dtype != np.uint8 or voxels.shape != tuple(box.shape):
        raise ValueError(f"voxels are {voxels.dtype} {voxels.shape}, box {box} takes uint8 {box.shape}")
    if array.zarr_shards is not None:
        return array.zarr_shards.encode(box, voxels)
    if array.jpeg_xl is not None:
        chunk_key = array.shard_files.chunk_key if array.shard_files else array.key
        objects = encode_chunks(array.level, chunk_key, box, voxels)
    else:
        objects = _by_tensorstore(array, box, voxels)
    return array.shard_files.pack(box, objects) if array.shard_files else objects


def _by_tensorstore(array: StoredArray, box: Box, voxels: Uint8Array) -> dict[str, bytes]:
    context = private_context()
    memory = {"kvstore": {"driver": "memory", "path": array.folder}, "store_data_equal_to_fill_value": True}
    target = ts.open(memory | array.known, open=True, assume_metadata=True, context=context).result()
    array.view(target)[box.slices()].write(voxels, can_reference_source_data_indefinitely=True).result()
    return stored_objects(context)


def open_stored(url: str, array: StoredArray) -> Reader:
    """Open the stored array for reading: the result gives the voxels of a box, (z, y, x) from (0, 0, 0).

    Raises TargetError where it is absent or of another shape, TransientError or UserError of the store.
    """
    if array.jpeg_xl is not None:
        chunks = open_chunks(url, array.folder, array.jpeg_xl, array.level, array.key, array.shard_files)
        return lambda box: chunks.start(box)()
    what = f"{url}/{array.folder}".rstrip("/")
    root = kv.spec(url)
    try:
        strict = {"kvstore": root | {"path": root["path"] + array.folder}, "fill_missing_data_reads": False}
        with waiting(what):
            view = array.view(ts.open(strict | array.stored, read=True, context=kv.context()).result())
    except Exception as error:
        fault = kv.classify(error, what)
        if isinstance(fault, (TransientError, UserError)):
            raise fault from error
        raise TargetError(
            f"target {what} cannot be opened ({fault})", "the array that the plan describes", "Create the target first"
        ) from error
    if view.shape != tuple(array.level.shape):
        raise TargetError(
            f"target {what} holds an array of {view.shape}", f"{array.level.shape}", "Give another target url"
        )
    return partial(_read_stored, url, array, view)


def read(store: kv.Store, array: StoredArray, reader: Reader, box: Box, absent: int | None) -> Uint8Array:
    """The voxels of `box` (z, y, x), read by `reader`, which open_stored returned.

    A shard without an object is filled with `absent` where that is given, else MissingChunkError. With `absent`, a
    stored shard that lacks one of its chunks is DamagedChunkError: it is never filled.
    """
    if not Box(ZYX(0, 0, 0), array.level.shape).contains(box):
        raise ValueError(f"box {box} is outside the array of {array.level.shape}")
    try:
        return _read_all(array, reader, box)
    except MissingChunkError:
        if absent is None:
            raise
    out = np.full(tuple(box.shape), absent, np.uint8)
    for piece in grid_parts(box, array.level.shard):
        try:
            out[piece.slices(box.start)] = _read_all(array, reader, piece)
        except MissingChunkError as error:
            key = array.key(piece.start // array.level.shard)
            if store.get(key) is not None:
                raise DamagedChunkError(f"{store.url}/{key} is there but a chunk of it is missing") from error
    return out


def _read_all(array: StoredArray, reader: Reader, box: Box) -> Uint8Array:
    requests.READS.take(chunk_count(box, array.level.chunk))
    return reader(box)


def _read_stored(url: str, array: StoredArray, view: ts.TensorStore, box: Box) -> Uint8Array:
    try:
        with kv.waiting_for_voxels(f"{url}/{array.folder} {box}", box.size):
            voxels: Uint8Array = np.asarray(view[box.slices()].read(order="C").result())
        holes = (
            []
            if array.shard_files is None
            else array.shard_files.lacks(url, _zero_chunks(array.level.chunk, box, voxels))
        )
    except Exception as error:
        raise kv.classify(error, f"{url}/{array.folder} {box}") from error
    if holes:
        raise MissingChunkError(
            f"{url}/{array.folder} {box}: {len(holes)} chunks are missing, the first is {holes[0]} of the grid"
        )
    return voxels


def _zero_chunks(chunk: ZYX, box: Box, voxels: Uint8Array) -> list[ZYX]:
    """Grid positions of the chunks that read as nothing but zeros within `box`: stored zeros, or not stored at all."""
    return [tile.start // chunk for tile in grid_parts(box, chunk) if not voxels[tile.slices(box.start)].any()]
