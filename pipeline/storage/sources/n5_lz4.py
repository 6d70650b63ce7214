"""N5 arrays in LZ4, which tensorstore does not read: as Java's library frames it, or in LZ4's own frames."""

from __future__ import annotations

import math
import struct
from functools import partial

import imagecodecs
import numpy as np
import tensorstore as ts

from pipeline.base.errors import DamagedChunkError
from pipeline.base.geometry import ZYX
from pipeline.storage import kv
from pipeline.storage.chunk_array import ChunkArray
from pipeline.storage.sources.n5_blocks import block_key
from pipeline.storage.sources.voxel_array import Level, Voxels, item_bytes

_MAGIC = b"LZ4Block"
_FRAME = struct.Struct("<8sBIII")
"""lz4-java's: magic, method, bytes packed and unpacked, checksum. Such blocks follow each other; one without bytes ends
them."""
_STORED = 0x10
"""The method whose bytes are not packed; its lower half is a size of buffers."""


def open_lz4(level: Level, path: str) -> ChunkArray:
    """The level, opened; `path` is the array's below the url."""
    store = ts.KvStore.open(kv.spec(level.url), context=kv.context()).result()
    name = partial(block_key, level, path)
    return ChunkArray(level.place, level.bounds, level.chunk, level.dtype, store, name, partial(_decode, level))


def _decode(level: Level, data: bytes, shape: ZYX, what: str) -> Voxels:
    """A block (z, y, x). Blocks may be larger than `shape`, at the array's end. Raises DamagedChunkError."""
    rank = len(level.stored_chunk)
    head = struct.Struct(f">HH{rank}I")
    try:
        mode, _, *sizes = head.unpack_from(data)
    except struct.error:
        raise DamagedChunkError(f"{what} has {len(data)} bytes, which is no N5 block") from None
    stored = ZYX.of([sizes[axis] for axis in level.zyx])
    if mode or min(stored - shape) < 0 or any(n > m for n, m in zip(sizes, level.stored_chunk, strict=True)):
        raise DamagedChunkError(
            f"{what} is an N5 block of mode {mode} and {sizes} (x first), wanted mode 0 and {shape}"
        )
    size = math.prod(sizes) * item_bytes(level.dtype)
    try:
        unpacked = _unpack(data[head.size :], size)
    except (ValueError, RuntimeError, struct.error) as error:
        raise DamagedChunkError(f"{what} cannot be decoded as LZ4 ({error})") from error
    if len(unpacked) != size:
        raise DamagedChunkError(f"{what} unpacks to {len(unpacked)} bytes, wanted {size}")
    voxels = np.frombuffer(unpacked, np.dtype(level.dtype).newbyteorder(">")).reshape(sizes, order="F")
    others = [axis for axis in range(rank) if axis not in level.zyx]
    ordered: Voxels = voxels.transpose([*others, *level.zyx])[(0,) * len(others)]
    return ordered[: shape.z, : shape.y, : shape.x]


def _unpack(data: bytes, most: int) -> bytes:
    """At most `most` + 1 bytes. Raises ValueError, RuntimeError or struct.error for what is no LZ4."""
    if not data.startswith(_MAGIC):
        return bytes(imagecodecs.lz4f_decode(data, out=most + 1))  # it cuts off what is beyond
    out, at = bytearray(), 0
    while at < len(data):
        magic, method, packed, size, _ = _FRAME.unpack_from(data, at)
        if size == 0:
            break
        if magic != _MAGIC or len(out) + size > most:
            raise ValueError(f"a frame of {size} bytes at byte {at}")
        at += _FRAME.size + packed
        part = data[at - packed : at]
        out += part if method & 0xF0 == _STORED else imagecodecs.lz4_decode(part, out=size)
    return bytes(out)
