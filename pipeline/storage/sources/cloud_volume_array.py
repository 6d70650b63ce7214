"""A local precomputed scale whose chunk files end in a compression suffix, read through cloud-volume."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.errors import DamagedChunkError, EmsrError, MissingChunkError, SourceError, TransientError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.config.urls import local_path
from pipeline.storage import jpeg_xl, kv
from pipeline.storage.sources.unpacked_size import exceeds, unpacked
from pipeline.storage.sources.voxel_array import Level, Pending, VoxelArray, Voxels, first_line, item_bytes

_SLACK_BYTES = 1 << 20
SUFFIXES = (".gz", ".br", ".zstd", ".bz2", ".xz")


def open_by_cloud_volume(level: Level, info: Mapping[str, Any], mip: int, key: str) -> VoxelArray:
    """Open a precomputed level through cloud-volume.

    `info` is the parsed info file, `mip` the scale's number in it, `key` the scale's folder. Raises SourceError where
    cloud-volume refuses the info.
    """
    from cloudvolume import CloudVolume

    root = local_path(level.url)
    assert root is not None
    try:
        volume = CloudVolume(
            f"file://{root}",
            mip=mip,
            info=dict(info),
            fill_missing=False,
            bounded=True,
            progress=False,
            parallel=1,
            cache=False,
        )
    except Exception as error:
        raise SourceError(
            f"{level.place} cannot be read: {first_line(error)}", "an info that cloud-volume reads", "Write it again"
        ) from error
    return _CloudVolumeArray(level, volume, root / key)


class _CloudVolumeArray:
    """Reads one box at a time, because a CloudVolume keeps state while it reads."""

    def __init__(self, level: Level, volume: Any, folder: Path) -> None:
        self._level, self._volume, self._folder, self._lock = level, volume, folder, threading.Lock()

    def start(self, box: Box) -> Pending:
        return lambda: self._read(box)

    def _read(self, box: Box) -> Voxels:
        from cloudvolume import Bbox

        (z0, y0, x0), (z1, y1, x1) = box.start, box.stop
        with kv.waiting_for_voxels(f"{self._level.place} at voxels {box}", box.size * item_bytes(self._level.dtype)):
            self._refuse_bombs(box)
            try:
                with self._lock:
                    voxels = self._volume.download(Bbox((x0, y0, z0), (x1, y1, z1)))
            except Exception as error:
                raise self._classify(error, box) from error
        return np.asarray(voxels)[..., 0].transpose(2, 1, 0)

    def _refuse_bombs(self, box: Box) -> None:
        """Raises DamagedChunkError where a chunk of `box` unpacks to much more than it should have, which cloud-volume
        would do in memory before it looks.
        """
        most = 2 * math.prod(self._level.stored_chunk) * item_bytes(self._level.dtype) + _SLACK_BYTES
        for path in self._files(box):
            try:
                bomb = exceeds(path, most)
            except Exception:  # damaged: cloud-volume says how
                continue
            if bomb:
                raise DamagedChunkError(
                    f"{self._level.place} at voxels {box}: {path.name} unpacks to more than {most:,} bytes, some twice "
                    "what a chunk has"
                )
        if self._level.identity["encoding"] == "jxl":
            self._refuse_other_images(box)

    def _refuse_other_images(self, box: Box) -> None:
        """Raises DamagedChunkError where a chunk of `box` is an image of another size, which may be any. The images
        are decoded twice by this: cloud-volume compresses such files again only where it is told to.
        """
        origin = self._level.bounds.start
        for part in grid_parts(Box(box.start - origin, box.stop - origin), self._level.chunk):
            position = part.start // self._level.chunk
            start = position * self._level.chunk
            shape = (start + self._level.chunk).minimum(self._level.bounds.shape) - start
            for suffix in ("", *SUFFIXES):
                path = self._folder / f"{chunk_name(self._level, position)}{suffix}"
                if not path.exists():
                    continue
                try:
                    image = unpacked(path)
                except Exception:  # damaged: cloud-volume says how
                    continue
                jpeg_xl.decode(image, shape, f"{self._level.place}: {path.name}", self._level.dtype)

    def _classify(self, error: Exception, box: Box) -> EmsrError:
        if isinstance(error, EmsrError):
            return error
        from cloudvolume.exceptions import EmptyVolumeException

        what = f"{self._level.place} at voxels {box}: {type(error).__name__} {first_line(error)}"
        if isinstance(error, EmptyVolumeException):
            # cloud-volume calls an empty file missing; here it is a damaged one
            empty = next((path for path in self._files(box) if path.stat().st_size == 0), None)
            return DamagedChunkError(f"{what} ({empty.name} has no bytes)") if empty else MissingChunkError(what)
        if isinstance(error, OSError):
            return TransientError(what)
        return DamagedChunkError(what)

    def _files(self, box: Box) -> list[Path]:
        """The files that exist for the chunks of `box`."""
        return [
            path
            for name in chunk_names(self._level, box)
            for suffix in ("", *SUFFIXES)
            if (path := self._folder / f"{name}{suffix}").exists()
        ]


def chunk_names(level: Level, box: Box) -> Iterator[str]:
    """The file names, without suffix, of the chunks that `box` touches."""
    origin = level.bounds.start
    for part in grid_parts(Box(box.start - origin, box.stop - origin), level.chunk):
        yield chunk_name(level, part.start // level.chunk)


def chunk_name(level: Level, position: ZYX) -> str:
    """The file name, without suffix, of the chunk at this position of the grid."""
    start = position * level.chunk + level.bounds.start
    stop = (start + level.chunk).minimum(level.bounds.stop)
    return f"{start.x}-{stop.x}_{start.y}-{stop.y}_{start.z}-{stop.z}"
