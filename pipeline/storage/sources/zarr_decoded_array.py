"""A Zarr array whose chunks tensorstore cannot decode: they are fetched as they are and decoded by numcodecs."""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tensorstore as ts

from pipeline.base.errors import DamagedChunkError, SourceError
from pipeline.base.geometry import ZYX
from pipeline.storage import kv
from pipeline.storage.chunk_array import ChunkArray
from pipeline.storage.sources.voxel_array import Level, Voxels, first_line, item_bytes

_SLACK_BYTES = 1 << 16
_FILTERS: dict[str, tuple[str, ...]] = {
    "delta": ("dtype", "astype"),
    "fixedscaleoffset": ("offset", "scale", "dtype", "astype"),
    "quantize": ("digits", "dtype", "astype"),
    "bitround": ("keepbits",),
    "astype": ("encode_dtype", "decode_dtype"),
    "packbits": (),
    "shuffle": ("elementsize",),
    "crc32": ("location",),
    "crc32c": ("location",),
    "adler32": ("location",),
    "fletcher32": (),
}
"""By numcodecs' name of a filter, the keys that its decoding takes. None of them makes more of a chunk than eight times
its bytes, and none runs code from the volume, as numcodecs' pickle would.
"""
_COMPRESSORS = {"blosc", "zstd", "gzip", "zlib", "bz2", "lz4", "lzma"}
DECODED = _COMPRESSORS | set(_FILTERS)


@dataclass(frozen=True)
class Chain:
    """How a chunk became bytes: its axes were put in the order `axes`, its voxels written as `dtype` (numpy's text with
    the byte order), and the bytes encoded by `codecs` in turn, numcodecs' configurations whose "id" is in DECODED.
    """

    dtype: str
    axes: tuple[int, ...]
    codecs: tuple[dict[str, Any], ...]


def open_decoded(level: Level, chain: Chain, name: Callable[[ZYX], str]) -> ChunkArray:
    """The level, opened; `name` gives the key of the chunk at a position of the grid. Raises SourceError for a codec's
    bad configuration.
    """
    most = 8 * math.prod(level.stored_chunk) + _SLACK_BYTES
    decoders = [_decoder(codec, most, level.place) for codec in reversed(chain.codecs)]
    store = ts.KvStore.open(kv.spec(level.url), context=kv.context()).result()
    decode = partial(_decode, level, chain, decoders)
    return ChunkArray(level.place, level.bounds, level.chunk, level.dtype, store, name, decode)


def _decode(
    level: Level, chain: Chain, decoders: list[Callable[[Any], Any]], data: bytes, _shape: ZYX, what: str
) -> Voxels:
    """The chunk's voxels (z, y, x); in a chunk that leaves the array, what lies outside too. Raises
    DamagedChunkError.
    """
    value: Any = data
    try:
        for decode in decoders:
            value = decode(value)
        voxels = np.frombuffer(value, np.uint8)
    except Exception as error:
        raise DamagedChunkError(f"{what}: {type(error).__name__} {first_line(error)}") from error
    wanted = math.prod(level.stored_chunk) * item_bytes(level.dtype)
    if voxels.size != wanted:
        raise DamagedChunkError(f"{what} holds {voxels.size:,} bytes of the {wanted:,} that a chunk has")
    axes, shape = chain.axes, level.stored_chunk
    stored = voxels.view(chain.dtype).reshape([shape[axis] for axis in axes])
    stored = stored.transpose([axes.index(axis) for axis in range(len(axes))])
    others = [axis for axis in range(len(axes)) if axis not in level.zyx]
    whole: Voxels = stored.transpose([*others, *level.zyx])[(0,) * len(others)]
    return whole


def _decoder(codec: dict[str, Any], most: int, place: str) -> Callable[[Any], Any]:
    """What decodes `codec`, refusing to make more than `most` bytes of a chunk."""
    name = codec["id"]
    if name in _FILTERS:
        import numcodecs

        try:
            decode: Callable[[Any], Any] = numcodecs.get_codec(
                {"id": name} | {key: codec[key] for key in _FILTERS[name] if codec.get(key) is not None}
            ).decode
        except Exception as error:
            raise SourceError(
                f"{place} has the codec {codec}, which numcodecs refuses ({first_line(error)})",
                "a codec with its settings",
                "Write the volume again",
            ) from None
        return lambda data: np.ascontiguousarray(decode(data))
    if name == "lzma":
        settings = {"format": codec.get("format", lzma.FORMAT_XZ)}
        if settings["format"] == lzma.FORMAT_RAW:
            settings["filters"] = codec.get("filters")
        return lambda data: _whole(lzma.LZMADecompressor(**settings), data, most)
    return {
        "gzip": lambda data: _whole(zlib.decompressobj(31), data, most),
        "zlib": lambda data: _whole(zlib.decompressobj(15), data, most),
        "bz2": lambda data: _whole(bz2.BZ2Decompressor(), data, most),
        "zstd": lambda data: _zstd(data, most),
        "blosc": lambda data: _blosc(data, most),
        "lz4": lambda data: _lz4(data, most),
    }[name]


def _whole(decompressor: Any, data: Any, most: int) -> bytes:
    value: bytes = decompressor.decompress(bytes(data), most)
    if not decompressor.eof:
        raise ValueError(f"cut off, or more than {most:,} bytes")
    return value


def _zstd(data: Any, most: int) -> bytes:
    import zstandard

    value: bytes = zstandard.ZstdDecompressor().stream_reader(bytes(data)).read(most)
    return value


def _blosc(data: Any, most: int) -> Any:
    from numcodecs import blosc

    _bounded(bytes(data)[4:8], most)
    return blosc.decompress(bytes(data))


def _lz4(data: Any, most: int) -> Any:
    from numcodecs import lz4

    _bounded(bytes(data)[:4], most)
    return lz4.decompress(bytes(data))


def _bounded(size: bytes, most: int) -> None:
    """Raises ValueError where the size that a chunk states is more than `most`."""
    if int.from_bytes(size, "little") > most:
        raise ValueError(f"more than {most:,} bytes")
