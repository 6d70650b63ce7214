"""Zarr v2 and v3 arrays and groups, OME-Zarr among them, as levels to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.base.errors import SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.limits import MAX_SHARD_CHUNKS
from pipeline.storage.sources import ome_multiscales
from pipeline.storage.sources.axes import find_zyx
from pipeline.storage.sources.metadata import Folder, Metadata, inner_path
from pipeline.storage.sources.ome_multiscales import OmeLevel
from pipeline.storage.sources.voxel_array import Level

_COMPRESSORS_V2 = ("blosc", "zstd", "gzip", "zlib", "bz2")
_CODECS_V3 = ("bytes", "transpose", "blosc", "zstd", "gzip", "crc32c", "sharding_indexed")
_REENCODE = "Re-encode it with blosc or zstd and no filters, e.g. with zarr-python"


@dataclass(frozen=True)
class _Node:
    """A group (array is None) or an array, in either version."""

    version: int
    path: str
    array: Metadata | None
    attributes: Metadata


def find_v3(folder: Folder, mip: int, array: str | None) -> Level | None:
    """The level that `mip` or `array` names; None where no Zarr v3 is at the url.

    Raises SourceError, TransientError.
    """
    return _find(folder, 3, mip, array)


def find_v2(folder: Folder, mip: int, array: str | None) -> Level | None:
    """The same for Zarr v2."""
    return _find(folder, 2, mip, array)


def _find(folder: Folder, version: int, mip: int, array: str | None) -> Level | None:
    root = _node(folder, "", version)
    if root is None:
        return None
    levels = ome_multiscales.multiscales(root.attributes) if root.array is None else None
    if array is not None:
        return _named(folder, root, levels, mip, array)
    if root.array is not None:
        _only_level(mip, folder.url)
        return _level(folder, root, None)
    if levels is None:
        raise SourceError(
            f"{folder.url} is a Zarr group without multiscales",
            "an array or an OME-Zarr image",
            "Name an array inside it by source.array",
        )
    chosen = ome_multiscales.pick(levels, mip, folder.url)
    return _level(
        folder, _inner(folder, version, chosen.path, f"the multiscales of {folder.url} name {chosen.path}"), chosen
    )


def _named(folder: Folder, root: _Node, levels: list[OmeLevel] | None, mip: int, array: str) -> Level:
    if root.array is not None:
        raise SourceError(
            f"source.array is {array!r}, and {folder.url} is an array itself",
            "one of the two",
            "Take source.array away",
        )
    if levels is not None and mip:
        raise SourceError(
            f"source.array is {array!r} and source.mip is {mip}", "one of the two: both choose a level", "Take one away"
        )
    _only_level(mip, f"{folder.url}/{array}")
    path = inner_path(array, SourceError(f"source.array is {array!r}", "a path inside the group"))
    node = _inner(folder, root.version, path, f"source.array is {array!r}")
    return _level(folder, node, next((level for level in levels or [] if level.path == path), None))


def _only_level(mip: int, place: str) -> None:
    if mip:
        raise SourceError(f"{place} has 1 level, source.mip is {mip}", "0")


def _inner(folder: Folder, version: int, path: str, saw: str) -> _Node:
    node = _node(folder, path, version)
    if node is None:
        raise SourceError(
            f"{saw}, and no Zarr v{version} array is there",
            "an array",
            "Check the name; if the copy is unfinished, finish it",
        )
    if node.array is None:
        raise SourceError(
            f"{saw}, and that is a group",
            "an array",
            "Append it to source.url, or name an array inside it by source.array",
        )
    return node


def _node(folder: Folder, path: str, version: int) -> _Node | None:
    base = f"{path}/" if path else ""
    nothing = Metadata({}, folder.url)
    if version == 3:
        found = folder.metadata(f"{base}zarr.json")
        if found is None:
            return None
        if found.integer("zarr_format") != 3:
            raise found.wrong("zarr_format", "3 in a zarr.json")
        kind = found.text("node_type", "array or group")
        if kind not in ("array", "group"):
            raise found.wrong("node_type", "array or group")
        return _Node(
            3, path, found if kind == "array" else None, found.child("attributes") if "attributes" in found else nothing
        )
    found = folder.metadata(f"{base}.zarray")
    attributes = folder.metadata(f"{base}.zattrs")
    if found is None and attributes is None and folder.metadata(f"{base}.zgroup") is None:
        return None
    if found is not None and found.integer("zarr_format") != 2:
        raise found.wrong("zarr_format", "2 in a .zarray")
    return _Node(2, path, found, attributes or nothing)


def _level(folder: Folder, node: _Node, ome: OmeLevel | None) -> Level:
    found = node.array
    assert found is not None
    shape = found.integers("shape", low=1)
    stored = _stored_v3(found, len(shape)) if node.version == 3 else _stored_v2(found, len(shape))
    names = _names(node, len(shape))
    if ome is not None:
        known = [n for n in names or () if n]
        if known and tuple(n.lower() for n in known) != ome.names:
            raise SourceError(
                f"{found.place} names its axes {known}, the multiscales say {list(ome.names)}",
                "the same names",
                "Mend one of the two",
            )
        names = ome.names
    zyx = find_zyx(names, shape, found.place)
    start = ZYX(0, 0, 0)
    identity = {
        k: v for k, v in found.values.items() if k not in ("attributes", "consolidated_metadata", "dimension_names")
    }
    return Level(
        url=folder.url,
        place=f"{folder.url}/{node.path}".rstrip("/"),
        format=f"zarr{node.version}",
        spec={"driver": "zarr3" if node.version == 3 else "zarr", "kvstore": folder.spec(node.path)},
        zyx=zyx,
        bounds=Box(start, ZYX.of([shape[axis] for axis in zyx])),
        chunk=ZYX.of([stored.chunk[axis] for axis in zyx]),
        stored_chunk=tuple(stored.chunk),
        dtype=stored.dtype,
        voxel_size_nm=ome.size_nm(zyx) if ome is not None else None,
        corner_voxels=ome.corner_voxels(zyx) if ome is not None else None,
        identity=identity,
        metadata_key=(f"{node.path}/" if node.path else "") + ("zarr.json" if node.version == 3 else ".zarray"),
    )


def _names(node: _Node, rank: int) -> Sequence[str | None] | None:
    """The names of the axes: dimension_names of Zarr v3, in Zarr v2 the attribute that xarray writes. None without."""
    holder, key = (node.array, "dimension_names") if node.version == 3 else (node.attributes, "_ARRAY_DIMENSIONS")
    if holder is None or key not in holder:
        return None
    value = holder.values[key]
    if not isinstance(value, list) or len(value) != rank or not all(v is None or isinstance(v, str) for v in value):
        raise holder.wrong(key, f"{rank} names")
    return value


@dataclass(frozen=True)
class _Stored:
    """The chunk that is decoded as one (of a shard its inner chunk), all axes in stored order, and the data type."""

    chunk: list[int]
    dtype: str


def _stored_v2(found: Metadata, rank: int) -> _Stored:
    dtype = found.values.get("dtype")
    if isinstance(dtype, list):
        raise found.wrong("dtype", "a plain number type", "Store the field that holds the image as an array of its own")
    name = _number_type(found, "dtype")
    if found.values.get("filters"):
        raise found.wrong("filters", "no filters (null)", _REENCODE)
    if "compressor" in found and (compressor := found.child("compressor")).text("id") not in _COMPRESSORS_V2:
        raise compressor.wrong("id", f"one of {', '.join(_COMPRESSORS_V2)}, or no compressor", _REENCODE)
    return _Stored(found.integers("chunks", rank, low=1), name)


def _stored_v3(found: Metadata, rank: int) -> _Stored:
    if not isinstance(found.values.get("data_type"), str):
        raise found.wrong(
            "data_type", "a plain number type", "Store the field that holds the image as an array of its own"
        )
    name = _number_type(found, "data_type")
    if found.values.get("storage_transformers"):
        raise found.wrong("storage_transformers", "none", _REENCODE)
    grid = found.child("chunk_grid")
    if grid.text("name") != "regular":
        raise grid.wrong("name", "regular chunks", "Rechunk it, e.g. with zarr-python")
    chunk = grid.child("configuration").integers("chunk_shape", rank, low=1)
    return _Stored(_inner_chunk(found, chunk) or chunk, name)


def _number_type(found: Metadata, key: str) -> str:
    try:
        dtype = np.dtype(found.text(key))
    except (TypeError, ValueError, SyntaxError):
        dtype = np.dtype("O")
    if dtype.kind not in "biufc":
        raise found.wrong(key, "a number type (uint8, or uint16 with an intensity_window)")
    return dtype.name


def _inner_chunk(holder: Metadata, outer: list[int]) -> list[int] | None:
    """The innermost chunk where the codecs shard the chunk `outer`, else None. Raises SourceError for a codec that
    cannot be read, and for a shard of too many chunks.
    """
    inner = None
    for codec in _codecs(holder, "codecs"):
        if codec.text("name") not in _CODECS_V3:
            raise codec.wrong("name", f"one of {', '.join(_CODECS_V3)}", _REENCODE)
        if codec.text("name") == "sharding_indexed":
            shard = codec.child("configuration")
            own = shard.integers("chunk_shape", len(outer), low=1)
            if math.prod(-(-n // m) for n, m in zip(outer, own, strict=True)) > MAX_SHARD_CHUNKS:
                raise shard.wrong(
                    "chunk_shape",
                    f"at most {MAX_SHARD_CHUNKS:,} chunks in a shard of {outer}, whose index is read whole",
                    "Write it again with larger chunks or smaller shards",
                )
            inner = _inner_chunk(shard, own) or own
    return inner


def _codecs(holder: Metadata, key: str) -> list[Metadata]:
    value: Any = holder.values.get(key)
    if isinstance(value, list) and any(isinstance(v, str) for v in value):
        return Metadata({key: [{"name": v} if isinstance(v, str) else v for v in value]}, holder.place).children(key)
    return holder.children(key)
