"""Chunks of precomputed volumes as JPEG XL images: encoded and decoded.

tensorstore does not know this encoding. A chunk is one grey image of x columns and y * z rows, as cloud-volume and
Neuroglancer have it.
"""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import DamagedChunkError
from pipeline.base.geometry import ZYX

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


def decode(data: bytes, shape: ZYX, what: str, dtype: str = "uint8") -> Voxels:
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
