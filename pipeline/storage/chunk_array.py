"""A level as an array whose chunks are decoded here, for encodings that tensorstore does not know."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from pipeline.base.errors import MissingChunkError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.storage import kv

Voxels = NDArray[Any]
_AT_ONCE_BYTES = 64 << 20
"""Chunks of so many voxels' bytes are fetched at a time."""


@dataclass(frozen=True)
class ChunkArray:
    """A level, open for reading. Safe to use from several threads.

    `place` is what messages call it. The grid of chunks begins at `bounds.start`; `name` gives the key in `store` of
    the chunk at a position in it. `decode` makes voxels (z, y, x) of a chunk's bytes, its shape, which ends with the
    bounds, and its name for messages; it raises DamagedChunkError.
    """

    place: str
    bounds: Box
    chunk: ZYX
    dtype: str
    store: ts.KvStore
    name: Callable[[ZYX], str | bytes]
    decode: Callable[[bytes, ZYX, str], Voxels]

    def start(self, box: Box) -> Callable[[], Voxels]:
        """Begin to read `box`, which is inside the bounds. Calling the result waits and returns the voxels (z, y, x).

        The result raises MissingChunkError, DamagedChunkError, TransientError or UserError.
        """
        origin, shape = self.bounds.start, self.bounds.shape
        parts = list(grid_parts(Box(box.start - origin, box.stop - origin), self.chunk))
        ahead = max(1, _AT_ONCE_BYTES // (self.chunk.product * np.dtype(self.dtype).itemsize))
        begun = deque(map(self._begin, parts[:ahead]))

        def wait() -> Voxels:
            voxels = np.empty(tuple(box.shape), self.dtype)
            for index, part in enumerate(parts):
                future = begun.popleft()
                begun.extend(map(self._begin, parts[index + ahead : index + ahead + 1]))
                corner = part.start // self.chunk * self.chunk
                size = (corner + self.chunk).minimum(shape) - corner
                name = self.name(part.start // self.chunk)
                shown = f" {name}" if isinstance(name, str) else ""  # in a shard a chunk has a number
                what = f"{self.place}: the chunk{shown} at voxels {Box.at(corner + origin, size)}"
                stored = self.decode(self._bytes(future, what, size), size, what)
                voxels[part.shift(origin).slices(box.start)] = stored[part.slices(corner)]
            return voxels

        return wait

    def _begin(self, part: Box) -> ts.Future[ts.KvStore.ReadResult]:
        return self.store.read(self.name(part.start // self.chunk))

    def _bytes(self, future: ts.Future[ts.KvStore.ReadResult], what: str, size: ZYX) -> bytes:
        try:
            with kv.waiting_for_voxels(what, size.product * np.dtype(self.dtype).itemsize):
                found = future.result()
        except Exception as error:
            raise kv.classify(error, what) from error
        if found.state != "value":
            raise MissingChunkError(f"{what} is not stored")
        return bytes(found.value)
