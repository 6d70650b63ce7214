"""Boxes of a source as uint8: intensities mapped, absent chunks filled only where volume.yaml says so."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from pipeline.base.errors import DamagedChunkError, DeniedError, MissingChunkError, TransientError, UserError
from pipeline.base.geometry import ZYX, Box, chunk_count, grid_parts
from pipeline.storage import kv, requests
from pipeline.storage.sources import absent_answer
from pipeline.storage.sources.grey_values import ToUint8
from pipeline.storage.sources.metadata import Folder
from pipeline.storage.sources.voxel_array import Level, VoxelArray, Voxels
from pipeline.storage.volume import Uint8Array, VolumeInfo

_CHUNKS_AT_ONCE = 64
"""Chunks requested at a time where some are absent."""


class VolumeSource:
    """A `Source` (storage/volume.py) over one opened level.

    `fill` is the grey value of absent chunks and of stored NaN; None makes both an error, which names `key` as the
    place to state one.
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
        self._denied = False
        """The store is known to answer 401 or 403 for chunks that are absent."""

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
            voxels = self._array.start(box)()
        except DamagedChunkError as error:
            raise DamagedChunkError(absent_answer.explained(self._level, error)) from error
        except (MissingChunkError, DeniedError) as error:
            if self._fill is None:
                self._check_hole(box, error)
                saw = f"{error}"
                if isinstance(error, DeniedError):
                    saw = f"{error.saw}. The chunk may be absent: this store answers so for what is not there"
                raise MissingChunkError(
                    f"{saw}. If holes are meant, state their grey value by {self._key}: "
                    f"{{fill: {self._info.unstored or 0}}}"
                ) from error
        else:
            return np.ascontiguousarray(self._grey(box, voxels))
        return self._read_around_holes(box, self._fill)

    def _grey(self, box: Box, voxels: Voxels) -> Uint8Array:
        """The grey values of what is stored in `box`."""
        if voxels.dtype.kind != "f" or not (absent := np.isnan(voxels)).any():
            return self._to_uint8(voxels)
        if self._fill is None:
            z, y, x = np.argwhere(absent)[0]
            raise DamagedChunkError(
                f"{self._level.place} is NaN at voxel {box.start + ZYX(int(z), int(y), int(x))}, {absent.sum():,} of "
                f"{absent.size:,} in {box}. If they stand for voxels that were not measured, state their grey value by "
                f"{self._key}: {{fill: 0}}"
            )
        grey = self._to_uint8(np.where(absent, voxels.dtype.type(0), voxels))
        grey[absent] = self._fill
        return grey

    def _read_around_holes(self, box: Box, fill: int) -> Uint8Array:
        out = np.full(tuple(box.shape), fill, np.uint8)
        chunks = self._chunks(box)
        first: tuple[Box, MissingChunkError | DeniedError] | None = None
        while batch := list(itertools.islice(chunks, _CHUNKS_AT_ONCE)):
            for part, pending in [(part, self._array.start(part)) for part in batch]:
                try:
                    out[part.slices(box.start)] = self._grey(part, pending())
                except (MissingChunkError, DeniedError) as error:
                    if first is None or isinstance(error, DeniedError):
                        first = part, error
        if first is not None:
            # Only now, after the last absent chunk, so that a disk lost on the way is noticed.
            self._check_hole(*first)
        return out

    def _chunks(self, box: Box) -> Iterator[Box]:
        origin = self._info.bounds.start
        return (
            part.shift(origin) for part in grid_parts(Box(box.start - origin, box.stop - origin), self._level.chunk)
        )

    def _check_hole(self, box: Box, missing: MissingChunkError | DeniedError) -> None:
        """Raises TransientError where the volume's metadata are absent too: of an unmounted disk every object is.

        Raises SourceError where the chunk is stored under another name, and `missing` itself where the store denies
        what is there.
        """
        if Folder(self._level.url).data(self._level.metadata_key) is None:
            if isinstance(missing, DeniedError):
                raise missing
            raise TransientError(f"the whole volume {self._level.url} has gone ({missing})") from missing
        if self._level.explain_hole is not None:
            self._level.explain_hole(box)
        if isinstance(missing, DeniedError) and not self._denied:
            self._refuse_rights(missing)
            self._denied = True

    def _refuse_rights(self, denied: DeniedError) -> None:
        """Raises `denied` where the store answers otherwise for a key that is absent, or not one chunk may be read."""
        if self._level.url.startswith("file://") or not absent_answer.is_denied(
            kv.Store(self._level.url), self._level.metadata_key
        ):
            raise denied
        looked = 0
        for at in self._spread():
            looked += 1
            try:
                self._array.start(Box(at, at + ZYX(1, 1, 1)))()
            except (MissingChunkError, DeniedError):
                continue
            return
        raise UserError(
            f"{denied.saw}; so are all of {looked} chunks throughout the volume, and keys that are absent",
            "the right to read chunks, or to list the bucket (s3:ListBucket), which tells rights from holes",
            "Ask the owner of the bucket",
        )

    def _spread(self) -> Iterator[ZYX]:
        """The first voxels of up to 125 chunks throughout the volume, the middle first, where data often is."""
        grid = self._info.bounds.shape.ceil_div(self._level.chunk)
        steps = [list(dict.fromkeys(i * (n - 1) // 4 for i in (2, 1, 3, 0, 4))) for n in grid]
        for z, y, x in itertools.product(*steps):
            requests.READS.take(1)
            yield ZYX(z, y, x) * self._level.chunk + self._info.bounds.start
