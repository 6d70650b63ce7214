"""N5 blocks checked against their headers, which tensorstore does not do."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from pipeline.base.errors import DamagedChunkError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.base.limits import MAX_CHUNK_BYTES
from pipeline.storage.sources.metadata import Folder
from pipeline.storage.sources.voxel_array import Level, Pending, TensorArray, Voxels

_MAX_STORED_BYTES = 2 * MAX_CHUNK_BYTES
"""No block that tensorstore has read is larger: voxels that cannot be compressed, and what compression adds to them."""


class WholeBlocks:
    """An array through tensorstore. Blocks shorter than they should be, which tensorstore fills up with zeros, are
    damaged; those of another mode than the default one are named.
    """

    def __init__(self, folder: Folder, path: str, level: Level, array: TensorArray) -> None:
        self._folder, self._path, self._level, self._array = folder, path, level, array

    def start(self, box: Box) -> Pending:
        pending = self._array.start(box)

        def wait() -> Voxels:
            try:
                voxels = pending()
            except DamagedChunkError as error:
                self._refuse_modes(box, error)
                raise
            if not voxels.all():
                for part in grid_parts(box, self._level.chunk):
                    self._check(part, voxels[part.slices(box.start)])
            return voxels

        return wait

    def _refuse_modes(self, box: Box, error: DamagedChunkError) -> None:
        """Raises DamagedChunkError that names a block of `box` with varying lengths, where there is one."""
        for key, head in self._heads(grid_parts(box, self._level.chunk)):
            mode = int.from_bytes(head[:2], "big")
            if len(head) >= 2 and mode:
                raise DamagedChunkError(
                    f"{self._folder.url}/{key} is an N5 block of mode {mode}, as objects or values of varying length "
                    "have; voxels have mode 0"
                ) from error

    def _check(self, part: Box, voxels: Voxels) -> None:
        """Compare the block's header with its shape. Only a block that ends in zeros along an axis can be short."""
        if all(np.take(voxels, -1, axis).any() for axis in range(3)):
            return
        grid = part.start // self._level.chunk
        wanted = (self._level.bounds.stop - grid * self._level.chunk).minimum(self._level.chunk)
        rank = len(self._level.stored_chunk)
        for key, head in self._heads(iter([part])):
            try:
                sizes = struct.unpack(f">{rank}I", head[4 : 4 + 4 * rank])
            except struct.error:
                sizes = (0,) * rank
            stored = ZYX.of([sizes[axis] for axis in self._level.zyx])
            if min(stored - wanted) < 0:
                raise DamagedChunkError(
                    f"{self._folder.url}/{key} holds {stored} (z, y, x) voxels of the {wanted} that its block has"
                )

    def _heads(self, parts: Iterator[Box]) -> Iterator[tuple[str, bytes]]:
        """Key and bytes of the blocks that hold these parts; no bytes for one that is absent."""
        for part in parts:
            key = block_key(self._level, self._path, part.start // self._level.chunk)
            yield key, self._folder.data(key, _MAX_STORED_BYTES) or b""


def block_key(level: Level, path: str, position: ZYX) -> str:
    """The key, below the url, of the block at this position (z, y, x) of the grid; `path` is the array's."""
    stored = ["0"] * len(level.stored_chunk)
    for axis, index in zip(level.zyx, position, strict=True):
        stored[axis] = str(index)
    return "/".join([*([path] if path else []), *stored])
