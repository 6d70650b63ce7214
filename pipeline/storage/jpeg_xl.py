"""Chunks of precomputed volumes as JPEG XL images: encoded, decoded, and a level of them as an array.

tensorstore does not know this encoding. A chunk is one grey image of x columns and y * z rows, as cloud-volume and
Neuroglancer have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from pipeline.base.errors import DamagedChunkError, MissingChunkError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.storage import kv

MAX_EDGE = 1 << 18
"""Rows and columns of an image of level 5, which every decoder reads."""
MAX_PIXELS = 1 << 28
DTYPES = ("uint8", "uint16")
Voxels = NDArray[Any]


def encode(voxels: Voxels) -> bytes:
    """One chunk (z, y, x), without loss and at the least effort. The same voxels give the same bytes for one version of
    libjxl.
    """
    rows = np.ascontiguousarray(voxels).reshape(-1, voxels.shape[-1])
    # One thread, though the bytes do not depend on it: a worker's cores are counted.
    return bytes(imagecodecs.jpegxl_encode(rows, lossless=True, effort=1, usecontainer=False, numthreads=1))


def decode(data: bytes, shape: ZYX, dtype: str, what: str) -> Voxels:
    """The chunk `what` of this shape. Raises DamagedChunkError where the image cannot be decoded or is another one.

    It is compared with what it should be before any pixel is decoded, so that a small file cannot fill the memory.
    """
    voxels = np.empty((shape.z * shape.y, shape.x), dtype)
    try:
        imagecodecs.jpegxl_decode(data, out=voxels, numthreads=1)
    except (ValueError, RuntimeError) as error:
        raise DamagedChunkError(
            f"{what} cannot be decoded as a JPEG XL image of {shape.z * shape.y} x {shape.x} {dtype} pixels ({error})"
        ) from error
    return voxels.reshape(tuple(shape))


@dataclass(frozen=True)
class JpegXlArray:
    """A level of such chunks, open for reading. Safe to use from several threads.

    `place` is what messages call it. The grid of chunks begins at `bounds.start`; `name` gives the key in `store` of
    the chunk at a position in it.
    """

    place: str
    bounds: Box
    chunk: ZYX
    dtype: str
    store: ts.KvStore
    name: Callable[[ZYX], str | bytes]

    def start(self, box: Box) -> Callable[[], Voxels]:
        """Begin to read `box`, which is inside the bounds. Calling the result waits and returns the voxels (z, y, x).

        The result raises MissingChunkError, DamagedChunkError, TransientError or UserError.
        """
        origin, shape = self.bounds.start, self.bounds.shape
        parts = list(grid_parts(Box(box.start - origin, box.stop - origin), self.chunk))
        futures = [self.store.read(self.name(part.start // self.chunk)) for part in parts]

        def wait() -> Voxels:
            voxels = np.empty(tuple(box.shape), self.dtype)
            for part, future in zip(parts, futures, strict=True):
                corner = part.start // self.chunk * self.chunk
                size = (corner + self.chunk).minimum(shape) - corner
                what = f"{self.place}: the chunk at voxels {Box.at(corner + origin, size)}"
                stored = decode(self._bytes(future, what, size), size, self.dtype, what)
                voxels[part.shift(origin).slices(box.start)] = stored[part.slices(corner)]
            return voxels

        return wait

    def _bytes(self, future: ts.Future[ts.KvStore.ReadResult], what: str, size: ZYX) -> bytes:
        try:
            with kv.waiting_for_voxels(what, size.product * np.dtype(self.dtype).itemsize):
                found = future.result()
        except Exception as error:
            raise kv.classify(error, what) from error
        if found.state != "value":
            raise MissingChunkError(f"{what} is not stored")
        return bytes(found.value)
