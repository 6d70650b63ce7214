"""Boxes of a source as uint8: intensities mapped, absent chunks filled only where volume.yaml says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import MissingChunkError, TransientError
from pipeline.base.geometry import Box, chunk_count, grid_parts
from pipeline.storage import requests
from pipeline.storage.sources.metadata import Folder
from pipeline.storage.sources.voxel_array import Level, VoxelArray, Voxels
from pipeline.storage.volume import Uint8Array, VolumeInfo

_CHUNKS_AT_ONCE = 64
"""Chunks requested at a time where some are absent."""
ToUint8 = Callable[[Voxels], Uint8Array]


def linear_table(low: int, high: int) -> NDArray[np.uint8]:
    """The uint8 value of each of the 65536 uint16 values: low..high linearly to 0..255, rounded half up, clamped
    outside.

    It is computed in integers, so that every machine gives the same.
    """
    values = np.clip(np.arange(65536, dtype=np.int64), low, high) - low
    return ((values * 510 + (high - low)) // (2 * (high - low))).astype(np.uint8)


class VolumeSource:
    """A `Source` (storage/volume.py) over one opened level.

    `fill` is the grey value of absent chunks; None makes them an error, which names `key` as the place to state one.
    """

    def __init__(
        self,
        info: VolumeInfo,
        level: Level,
        array: VoxelArray,
        to_uint8: ToUint8,
        fill: int | None,
        key: str = "source.missing_chunks",
    ) -> None:
        self._info, self._level, self._array = info, level, array
        self._to_uint8, self._fill, self._key = to_uint8, fill, key

    @property
    def info(self) -> VolumeInfo:
        return self._info

    def read(self, box: Box) -> Uint8Array:
        """The voxels of `box`, uint8 (z, y, x), C-contiguous.

        With `fill`, absent chunks hold that grey value. Raises ValueError where the box leaves info.bounds, and what
        `Source.read` raises.
        """
        if min(box.stop - box.start) < 0 or not self._info.bounds.contains(box):
            raise ValueError(f"box {box} is not inside the volume's {self._info.bounds}")
        if box.empty:
            return np.empty(tuple(box.shape), np.uint8)
        local = Box(box.start - self._info.bounds.start, box.stop - self._info.bounds.start)
        requests.READS.take(chunk_count(local, self._level.chunk))
        try:
            return np.ascontiguousarray(self._to_uint8(self._array.start(box)()))
        except MissingChunkError as error:
            if self._fill is None:
                self._check_hole(box, error)
                raise MissingChunkError(
                    f"{error}. If holes are meant, state their grey value by {self._key}: {{fill: 0}}"
                ) from error
        return self._read_around_holes(box, self._fill)

    def _read_around_holes(self, box: Box, fill: int) -> Uint8Array:
        out = np.full(tuple(box.shape), fill, np.uint8)
        chunks = self._chunks(box)
        first: tuple[Box, MissingChunkError] | None = None
        while batch := list(itertools.islice(chunks, _CHUNKS_AT_ONCE)):
            for part, pending in [(part, self._array.start(part)) for part in batch]:
                try:
                    out[part.slices(box.start)] = self._to_uint8(pending())
                except MissingChunkError as error:
                    first = first or (part, error)
        if first is not None:
            # Only now, after the last absent chunk, so that a disk lost on the way is noticed.
            self._check_hole(*first)
        return out

    def _chunks(self, box: Box) -> Iterator[Box]:
        origin = self._info.bounds.start
        return (
            part.shift(origin) for part in grid_parts(Box(box.start - origin, box.stop - origin), self._level.chunk)
        )

    def _check_hole(self, box: Box, missing: MissingChunkError) -> None:
        """Raises TransientError where the volume's metadata are absent too: of an unmounted disk every object is.

        Raises SourceError where the chunk is stored under another name.
        """
        if Folder(self._level.url).data(self._level.metadata_key) is None:
            raise TransientError(f"the whole volume {self._level.url} has gone ({missing})") from missing
        if self._level.explain_hole is not None:
            self._level.explain_hole(box)
