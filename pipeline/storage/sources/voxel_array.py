"""One level of a stored volume as a (z, y, x) array of its own data type, read through tensorstore."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from pipeline.base.errors import SourceError, TransientError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.limits import MAX_CHUNK_BYTES
from pipeline.base.waits import waiting
from pipeline.storage import kv

Voxels = NDArray[Any]
"""Stored values (z, y, x) of the volume's own data type."""
Pending = Callable[[], Voxels]
"""A read in progress: calling it waits and returns the voxels."""


@dataclass(frozen=True)
class Level:
    """What a format's metadata says of one level, which is not opened yet. Raises SourceError for chunks beyond
    MAX_CHUNK_BYTES.

    `place` is what messages call it, `spec` tensorstore's JSON that opens it. `zyx` are the indices of the axes z, y, x
    in stored order; `stored_chunk` has all axes in stored order. The chunk grid starts at `bounds.start`.
    `corner_voxels` is the position of the lower corner of voxel (0, 0, 0), in voxels; None where the metadata states
    none. `unitless` is a voxel size (z, y, x) stated without a unit: where the true one is no multiple of it,
    `corner_voxels` means nothing. `seen` says what was found in place of a voxel size, and `notes` what the user is to
    be told. `labels` is True where the metadata says that the volume is a segmentation. `identity` is the metadata that
    defines the voxels, for the fingerprint. `fill_value` is the JSON that states the value of chunks that are not
    stored; None is as good as 0. `metadata_key` is an object below `url` that exists as long as the volume
    does. `explain_hole` is called with the box of an absent chunk, and raises SourceError where the chunk is stored
    under another name. `sharded` is True where many chunks lie in one object, of which parts are read. `opener` opens
    the level.
    """

    url: str
    place: str
    format: str
    spec: dict[str, Any] = field(repr=False)
    zyx: tuple[int, int, int]
    bounds: Box
    chunk: ZYX
    stored_chunk: tuple[int, ...] = field(repr=False)
    dtype: str
    voxel_size_nm: tuple[float, float, float] | None
    identity: Mapping[str, Any] = field(repr=False)
    metadata_key: str
    corner_voxels: tuple[float, float, float] | None = None
    unitless: tuple[float, float, float] | None = None
    seen: str = ""
    notes: tuple[str, ...] = ()
    labels: bool = False
    sharded: bool = False
    fill_value: Any = None
    reader: str = "tensorstore"
    explain_hole: Callable[[Box], None] | None = field(default=None, repr=False)
    opener: Callable[[Level], VoxelArray] = field(default=lambda level: open_array(level), repr=False)

    def __post_init__(self) -> None:
        if math.prod(self.stored_chunk) * item_bytes(self.dtype) > MAX_CHUNK_BYTES:
            raise SourceError(
                f"{self.place} has chunks of {list(self.stored_chunk)} voxels",
                "at most 1 GiB each",
                "Rechunk it, e.g. to [8, 256, 256]",
            )


class VoxelArray(Protocol):
    """A level that is open for reading."""

    def start(self, box: Box) -> Pending:
        """Begin to read `box`, which is inside the bounds. Calling the result waits and returns the voxels (z, y, x).

        The result raises MissingChunkError, DamagedChunkError, TransientError or UserError.
        """
        ...


def item_bytes(dtype: str) -> int:
    """Bytes per voxel."""
    return np.dtype(dtype).itemsize


def open_array(level: Level) -> TensorArray:
    """The level, opened through tensorstore. Raises SourceError where that refuses the metadata, TransientError for a
    passing fault.
    """
    options = {"fill_missing_data_reads": False, "recheck_cached_data": "open", "open": True, "create": False}
    try:
        with waiting(level.place):
            store = ts.open(level.spec | options, context=kv.context()).result()
        others = [axis for axis in range(store.rank) if axis not in level.zyx]
        array = store.transpose([*others, *level.zyx])[tuple(store.domain[axis].inclusive_min for axis in others)]
        found = Box.of(array.domain.inclusive_min, array.domain.exclusive_max)
        dtype = array.dtype.name
    except Exception as error:
        fault = kv.classify(error, level.url)
        if isinstance(fault, (TransientError, SourceError)):
            raise fault from error
        raise SourceError(
            f"{level.place} cannot be read: {first_line(error)}",
            "metadata that tensorstore reads",
            "Write the volume again",
        ) from error
    if found != level.bounds or dtype != level.dtype:
        raise SourceError(
            f"{level.place} changed while it was opened: {found} of {dtype}, before {level.bounds} of {level.dtype}",
            "a volume at rest",
        )
    return TensorArray(level, array)


def first_line(error: BaseException, limit: int = 400) -> str:
    """An error's text as one line, without tensorstore's appended specification."""
    text = " ".join(str(error).split("[tensorstore_spec")[0].split("[source locations")[0].split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


class TensorArray:
    """A level opened by tensorstore. Safe to use from several threads."""

    def __init__(self, level: Level, array: ts.TensorStore) -> None:
        self._level, self._array = level, array

    def start(self, box: Box) -> Pending:
        future = self._array[box.slices()].read(order="C")
        what = f"{self._level.place} at voxels {box}"

        def wait() -> Voxels:
            try:
                with kv.waiting_for_voxels(what, box.size * item_bytes(self._level.dtype)):
                    voxels: Voxels = future.result()
            except Exception as error:
                raise kv.classify(error, what) from error
            return voxels

        return wait
