"""How a Zarr array's chunks are encoded: its metadata checked, and written anew with what decoding needs.

tensorstore refuses every key that it does not know. It is given the metadata made here, without levels, fill values and
whatever else changes no decoded voxel. What it cannot decode gets a chain for zarr_decoded_array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.base.limits import MAX_SHARD_CHUNKS
from pipeline.storage.sources.metadata import Metadata
from pipeline.storage.sources.zarr_decoded_array import DECODED, Chain

_ALIASES = {"bzip2": "bz2", "endian": "bytes"}
_BY_TENSORSTORE_V2 = ("blosc", "zstd", "gzip", "zlib", "bz2")
_BY_TENSORSTORE_V3 = {
    "blosc": {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle"},
    "zstd": {"level": 1},
    "gzip": {"level": 1},
    "crc32c": {},
}
"""The configuration that tensorstore is given: decoding takes what it needs from the chunk itself."""
_KNOWN_V3 = {
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "fill_value",
    "codecs",
    "attributes",
    "dimension_names",
    "storage_transformers",
    "consolidated_metadata",
}
_REENCODE = "Re-encode it with blosc or zstd and no filters, e.g. with zarr-python"
_STORE_IMAGE = "Store the field that holds the image, or its values, as an array of its own of uint8, uint16 or float32"
_INDEX = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


@dataclass(frozen=True)
class Stored:
    """`chunk` is what is decoded as one, `stored_object` what one object holds: of a shard they differ. Both have all
    axes in stored order.

    `dtype` is numpy's name of the data type, and `separator` stands between the numbers in a chunk's key; `prefix`
    before them. `metadata` is what tensorstore opens; `chain` stands in its place where tensorstore cannot decode.
    """

    chunk: list[int]
    stored_object: list[int]
    dtype: str
    separator: str
    prefix: str
    metadata: dict[str, Any] = field(repr=False)
    chain: Chain | None = None


def stored_v2(found: Metadata, rank: int) -> Stored:
    """From a .zarray. Raises SourceError where it cannot be read."""
    dtype = _number_type(found, "dtype")
    chunk = found.integers("chunks", rank, low=1)
    order = found.text("order").upper() if "order" in found else "C"
    if order not in ("C", "F"):
        raise found.wrong("order", "C or F")
    codecs = found.children("filters") if found.values.get("filters") else []
    plain = not codecs
    compressor = None
    if "compressor" in found:
        stated = found.child("compressor")
        compressor = _name(stated, "id")
        codecs = [*codecs, stated]
        plain = plain and compressor in _BY_TENSORSTORE_V2
    metadata = {
        "zarr_format": 2,
        "shape": found.integers("shape", rank, low=1),
        "chunks": chunk,
        "dtype": dtype.str,
        "order": order,
        "fill_value": None,
        "compressor": None if compressor is None else {"id": compressor},
        "filters": None,
    }
    axes = tuple(range(rank)) if order == "C" else tuple(range(rank))[::-1]
    chain = None if plain else Chain(dtype.str, axes, tuple(_decoded(codec, "id", codec.values) for codec in codecs))
    separator = _separator(found, "dimension_separator", ".")
    return Stored(chunk, chunk, dtype.name, separator, "", metadata, chain)


def stored_v3(found: Metadata, rank: int) -> Stored:
    """From the zarr.json of an array. Raises SourceError where it cannot be read."""
    for key, value in found.values.items():
        extends = isinstance(value, dict) and ("name" in value or "must_understand" in value)
        if key not in _KNOWN_V3 and extends and value.get("must_understand") is not False:
            raise found.wrong(key, "no extension that readers must understand", _REENCODE)
    if found.values.get("storage_transformers"):
        raise found.wrong("storage_transformers", "none", _REENCODE)
    dtype = _number_type(_named(found, "data_type"), "name")
    grid = _named(found, "chunk_grid")
    if grid.text("name") != "regular":
        raise grid.wrong("name", "regular chunks", "Rechunk it, e.g. with zarr-python")
    chunk = grid.child("configuration").integers("chunk_shape", rank, low=1)
    keys = _named(found, "chunk_key_encoding") if "chunk_key_encoding" in found else Metadata({"name": "default"}, "")
    style = keys.text("name")
    if style not in ("default", "v2"):
        raise keys.wrong("name", "default or v2", _REENCODE)
    separator = _separator(_configuration(keys), "separator", "/" if style == "default" else ".")
    codecs = _codecs(found, "codecs")
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": found.integers("shape", rank, low=1),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": style, "configuration": {"separator": separator}},
        "fill_value": False if dtype.kind == "b" else [0.0, 0.0] if dtype.kind == "c" else 0,
    }
    prefix = f"c{separator}" if style == "default" else ""
    names = [_name(codec, "name") for codec in codecs]
    if set(names) & (DECODED - set(_BY_TENSORSTORE_V3)) and "sharding_indexed" not in names:
        return Stored(chunk, chunk, dtype.name, separator, prefix, metadata, _chain(codecs, dtype, rank))
    rewritten, inner = _rewritten(codecs, chunk)
    return Stored(inner, chunk, dtype.name, separator, prefix, metadata | {"codecs": rewritten})


def _number_type(found: Metadata, key: str) -> np.dtype[Any]:
    if isinstance(found.values.get(key), (list, dict)):
        raise found.wrong(key, "a plain number type", _STORE_IMAGE)
    try:
        dtype = np.dtype(found.text(key))
    except (TypeError, ValueError, SyntaxError):
        dtype = np.dtype("O")
    if dtype.kind not in "biufc":
        raise found.wrong(key, "a number type (uint8, or another with an intensity_window)", _STORE_IMAGE)
    return dtype


def _separator(holder: Metadata, key: str, default: str) -> str:
    value = holder.text(key) if key in holder else default
    if value not in (".", "/"):
        raise holder.wrong(key, '"." or "/"')
    return value


def _named(holder: Metadata, key: str) -> Metadata:
    """An extension point of Zarr v3: an object with `name` and perhaps `configuration`, or the name alone."""
    value = holder.values.get(key)
    return Metadata({"name": value}, f"{holder.place} {key}") if isinstance(value, str) else holder.child(key)


def _configuration(named: Metadata) -> Metadata:
    return named.child("configuration") if "configuration" in named else Metadata({}, named.place)


def _codecs(holder: Metadata, key: str) -> list[Metadata]:
    value: Any = holder.values.get(key)
    if value == []:
        return []
    if isinstance(value, list) and any(isinstance(v, str) for v in value):
        return Metadata({key: [{"name": v} if isinstance(v, str) else v for v in value]}, holder.place).children(key)
    return holder.children(key)


def _name(codec: Metadata, key: str) -> str:
    """The codec's name as numcodecs and tensorstore have it."""
    name = codec.text(key).lower().removeprefix("numcodecs.")
    return _ALIASES.get(name, name)


def _decoded(codec: Metadata, key: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The codec for a chain. Raises SourceError for one that nothing here decodes."""
    name = _name(codec, key)
    if name not in DECODED:
        raise codec.wrong(key, f"one of {', '.join(sorted(DECODED))}", _REENCODE)
    return {**configuration, "id": name}


def _rewritten(codecs: list[Metadata], chunk: list[int]) -> tuple[list[dict[str, Any]], list[int]]:
    """The codecs as tensorstore reads them, and the innermost chunk. Raises SourceError for a codec that it does not
    read, and for a shard of too many chunks.
    """
    out: list[dict[str, Any]] = []
    inner, to_bytes = chunk, False
    for codec in codecs:
        name, configuration = _name(codec, "name"), _configuration(codec)
        if inner is not chunk:
            raise codec.wrong("name", "no codec after sharding_indexed", _REENCODE)
        if name in ("transpose", "bytes", "sharding_indexed"):
            if to_bytes:
                raise codec.wrong("name", "one codec that turns voxels into bytes", _REENCODE)
            to_bytes = name != "transpose"
        elif name not in _BY_TENSORSTORE_V3:
            known = ", ".join(("bytes", "transpose", "sharding_indexed", *_BY_TENSORSTORE_V3))
            raise codec.wrong("name", f"one of {known}", _REENCODE)
        elif not to_bytes:
            out, to_bytes = [*out, _bytes(Metadata({}, ""))], True
        if name == "transpose":
            order = _transposed(configuration, len(chunk))
            chunk = inner = [chunk[axis] for axis in order]
            out.append({"name": name, "configuration": {"order": list(order)}})
        elif name == "bytes":
            out.append(_bytes(configuration))
        elif name == "sharding_indexed":
            shard, inner = _shard(configuration, chunk)
            out.append({"name": name, "configuration": shard})
        else:
            out.append({"name": name, "configuration": _BY_TENSORSTORE_V3[name]})
    if not to_bytes:
        out.append(_bytes(Metadata({}, "")))
    for codec_out in reversed(out):
        if codec_out["name"] == "transpose":
            order = codec_out["configuration"]["order"]
            inner = [inner[order.index(axis)] for axis in range(len(inner))]
    return out, inner


def _shard(configuration: Metadata, chunk: list[int]) -> tuple[dict[str, Any], list[int]]:
    own = configuration.integers("chunk_shape", len(chunk), low=1)
    if any(n % m for n, m in zip(chunk, own, strict=True)):
        raise configuration.wrong("chunk_shape", f"chunks that divide the shard of {chunk}", "Write it again")
    if math.prod(n // m for n, m in zip(chunk, own, strict=True)) > MAX_SHARD_CHUNKS:
        raise configuration.wrong(
            "chunk_shape",
            f"at most {MAX_SHARD_CHUNKS:,} chunks in a shard of {chunk}, whose index is read whole",
            "Write it again with larger chunks or smaller shards",
        )
    place = configuration.text("index_location") if "index_location" in configuration else "end"
    if place not in ("start", "end"):
        raise configuration.wrong("index_location", "start or end")
    index = _codecs(configuration, "index_codecs") if "index_codecs" in configuration else []
    for codec in index:
        if _name(codec, "name") not in ("bytes", "crc32c"):
            raise codec.wrong("name", "bytes and crc32c for the index of a shard", _REENCODE)
    inner_codecs, inner = _rewritten(_codecs(configuration, "codecs"), own)
    index_codecs = _rewritten(index, [*chunk, 2])[0] if index else _INDEX
    shard = {"chunk_shape": own, "codecs": inner_codecs, "index_codecs": index_codecs, "index_location": place}
    return shard, inner


def _bytes(configuration: Metadata) -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": _endian(configuration)}}


def _endian(configuration: Metadata) -> str:
    endian = configuration.text("endian") if "endian" in configuration else "little"
    if endian not in ("little", "big"):
        raise configuration.wrong("endian", "little or big")
    return endian


def _transposed(configuration: Metadata, rank: int) -> tuple[int, ...]:
    order = configuration.values.get("order")
    if order in ("C", "F"):
        return tuple(range(rank)) if order == "C" else tuple(range(rank))[::-1]
    axes = configuration.integers("order", rank)
    if sorted(axes) != list(range(rank)):
        raise configuration.wrong("order", "each axis once")
    return tuple(axes)


def _chain(codecs: list[Metadata], dtype: np.dtype[Any], rank: int) -> Chain:
    """The codecs as a chain. Raises SourceError where one cannot be decoded, or not in its place."""
    axes, endian, out = tuple(range(rank)), "little", list[dict[str, Any]]()
    for codec in codecs:
        name, configuration = _name(codec, "name"), _configuration(codec)
        if name == "transpose" and not out:
            axes = tuple(axes[axis] for axis in _transposed(configuration, rank))
        elif name == "bytes":
            endian = _endian(configuration)
            if endian == "big" and out:
                raise configuration.wrong("endian", "little after filters", _REENCODE)
        elif name == "transpose":
            raise codec.wrong("name", "no transpose after filters", _REENCODE)
        else:
            out.append(_decoded(codec, "name", configuration.values))
    return Chain(dtype.newbyteorder("<" if endian == "little" else ">").str, axes, tuple(out))
