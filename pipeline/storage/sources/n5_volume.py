"""N5 arrays and multiscale groups (s0, s1, ...) as levels to read. In N5's metadata x comes first."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from pipeline.base.errors import DamagedChunkError, SourceError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.storage.sources.axes import find_zyx, nm_per
from pipeline.storage.sources.metadata import Folder, Metadata, inner_path
from pipeline.storage.sources.voxel_array import Level, Pending, TensorArray, VoxelArray, Voxels, open_array

_COMPRESSIONS = ("raw", "gzip", "bzip2", "xz", "blosc", "zstd")
_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64")
_MAX_LEVELS = 64


def find(folder: Folder, mip: int, array: str | None) -> Level | None:
    """The level that `mip` or `array` names; None where no N5 is at the url. Raises SourceError, TransientError."""
    root = folder.metadata("attributes.json")
    if array is not None:
        return _named(folder, root, mip, array)
    if root is not None and _is_array(root):
        if mip:
            raise SourceError(f"{folder.url} has 1 level, source.mip is {mip}", "0")
        return _level(folder, "", root, None, 0)
    found = folder.metadata(f"s{mip}/attributes.json") if mip < _MAX_LEVELS else None
    if found is not None and _is_array(found):
        return _level(folder, f"s{mip}", found, root, mip)
    count = next((n for n in range(_MAX_LEVELS) if folder.data(f"s{n}/attributes.json") is None), _MAX_LEVELS)
    if count and found is None:
        raise SourceError(
            f"{folder.url} has {count} level{'s' * (count > 1)}, source.mip is {mip}", f"0 to {count - 1}"
        )
    if root is None and not count:
        return None
    place = f"{folder.url}/s{mip}" if count else folder.url
    raise SourceError(
        f"{place} is an N5 group without dimensions or levels s0, s1, ...",
        "an array",
        "Name an array inside it by source.array",
    )


def _named(folder: Folder, root: Metadata | None, mip: int, array: str) -> Level | None:
    path = inner_path(array, SourceError(f"source.array is {array!r}", "a path inside the group"))
    found = folder.metadata(f"{path}/attributes.json")
    if root is None and found is None:
        return None
    if root is not None and _is_array(root):
        raise SourceError(
            f"source.array is {array!r}, and {folder.url} is an array itself",
            "one of the two",
            "Take source.array away",
        )
    if mip:
        raise SourceError(
            f"source.array is {array!r} and source.mip is {mip}", "one of the two: both choose a level", "Take one away"
        )
    if found is None or not _is_array(found):
        saw = "no N5 array is there" if found is None else "that is a group"
        raise SourceError(
            f"source.array is {array!r}, and {saw}", "an array", "Check the name, or append it to source.url"
        )
    return _level(folder, path, found, root, int(path[1:]) if path[:1] == "s" and path[1:].isdecimal() else None)


def _is_array(found: Metadata) -> bool:
    return any(key in found for key in ("dimensions", "blockSize", "dataType"))


def _level(folder: Folder, path: str, found: Metadata, group: Metadata | None, number: int | None) -> Level:
    dimensions = found.integers("dimensions", low=1)
    rank = len(dimensions)
    block = found.integers("blockSize", rank, low=1, high=2**31 - 1)
    dtype = found.text("dataType")
    if dtype not in _DTYPES:
        raise found.wrong("dataType", f"one of {', '.join(_DTYPES)}")
    place = f"{folder.url}/{path}".rstrip("/")
    zyx = find_zyx(_words(found, "axes", rank), dimensions, place, x_first=True)
    return Level(
        url=folder.url,
        place=place,
        format="n5",
        spec={"driver": "n5", "kvstore": folder.spec(path)},
        zyx=zyx,
        bounds=Box(ZYX(0, 0, 0), ZYX.of([dimensions[axis] for axis in zyx])),
        chunk=ZYX.of([block[axis] for axis in zyx]),
        stored_chunk=tuple(block),
        dtype=dtype,
        voxel_size_nm=_voxel_size(found, group, number, zyx, rank),
        identity={"dimensions": dimensions, "blockSize": block, "dataType": dtype, "compression": _compression(found)},
        metadata_key=(f"{path}/" if path else "") + "attributes.json",
        opener=lambda level: _open(folder, path, level),
    )


def _compression(found: Metadata) -> Any:
    """The value of `compression`, or of `compressionType` before N5 2.0. Raises SourceError for one that cannot be
    read.
    """
    old = "compression" not in found and "compressionType" in found
    holder, key = (found, "compressionType") if old else (found.child("compression"), "type")
    if holder.text(key) not in _COMPRESSIONS:
        raise holder.wrong(key, f"one of {', '.join(_COMPRESSIONS)}", "Re-encode it with gzip or zstd")
    return found.values[key if old else "compression"]


def _words(found: Metadata, key: str, rank: int) -> list[str | None] | None:
    value = found.values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != rank or not all(isinstance(v, str) for v in value):
        raise found.wrong(key, f"{rank} words")
    return value


def _voxel_size(
    found: Metadata, group: Metadata | None, number: int | None, zyx: tuple[int, int, int], rank: int
) -> tuple[float, float, float] | None:
    """The level's voxel size (z, y, x) in nm; None where the metadata gives none.

    It is the level's own resolution, or its group's, times the level's downsamplingFactors or the group's
    scales[number].
    """
    own = _resolution(found, rank)
    base = own or (_resolution(group, rank) if group is not None else None)
    if base is None:
        return None
    factors = [1.0] * rank
    if "downsamplingFactors" in found:
        factors = found.numbers("downsamplingFactors", rank, positive=True)
    elif own is None and group is not None and number is not None and "scales" in group:
        factors = _factors(group, number, rank)
    elif own is None and number != 0:
        return None
    z, y, x = (base[axis] * factors[axis] for axis in zyx)
    return z, y, x


def _factors(group: Metadata, number: int, rank: int) -> list[float]:
    scales = group.values["scales"]
    if not isinstance(scales, list) or number >= len(scales):
        raise group.wrong("scales", "a list with the factors of every level")
    return Metadata({"scales": scales[number]}, f"{group.place} scales[{number}]").numbers(
        "scales", rank, positive=True
    )


def _resolution(holder: Metadata, rank: int) -> list[float] | None:
    """nm per voxel in stored order; None where none is given or its unit is no unit of length."""
    if "pixelResolution" in holder:
        if isinstance(holder.values["pixelResolution"], list):
            return holder.numbers("pixelResolution", rank, positive=True)
        inner = holder.child("pixelResolution")
        factor = nm_per(inner.text("unit")) if "unit" in inner else None
        sizes = inner.numbers("dimensions", rank, positive=True)
        return [size * factor for size in sizes] if factor else None
    if "resolution" in holder:
        sizes = holder.numbers("resolution", rank, positive=True)
        factors = [nm_per(unit) for unit in _words(holder, "units", rank) or ["nm"] * rank]
        return (
            [size * factor for size, factor in zip(sizes, factors, strict=True) if factor]
            if None not in factors
            else None
        )
    return None


def _open(folder: Folder, path: str, level: Level) -> VoxelArray:
    return _WholeBlocks(folder, path, level, open_array(level))


class _WholeBlocks:
    """Raises DamagedChunkError for blocks shorter than they should be, which tensorstore fills up with zeros."""

    def __init__(self, folder: Folder, path: str, level: Level, array: TensorArray) -> None:
        self._folder, self._path, self._level, self._array = folder, path, level, array

    def start(self, box: Box) -> Pending:
        pending = self._array.start(box)

        def wait() -> Voxels:
            voxels = pending()
            if not voxels.all():
                for part in grid_parts(box, self._level.chunk):
                    self._check(part, voxels[part.slices(box.start)])
            return voxels

        return wait

    def _check(self, part: Box, voxels: Voxels) -> None:
        """Compare the block's header with its shape. Only a block that ends in zeros along an axis can be short."""
        if all(np.take(voxels, -1, axis).any() for axis in range(3)):
            return
        grid = part.start // self._level.chunk
        wanted = (self._level.bounds.stop - grid * self._level.chunk).minimum(self._level.chunk)
        rank = len(self._level.identity["dimensions"])
        position = ["0"] * rank
        for axis, index in zip(self._level.zyx, grid, strict=True):
            position[axis] = str(index)
        key = "/".join([*([self._path] if self._path else []), *position])
        data = self._folder.data(key)
        try:
            sizes = struct.unpack(f">{rank}I", (data or b"")[4 : 4 + 4 * rank])
        except struct.error:
            sizes = (0,) * rank
        stored = ZYX.of([sizes[axis] for axis in self._level.zyx])
        if min(stored - wanted) < 0:
            raise DamagedChunkError(
                f"{self._folder.url}/{key} holds {stored} (z, y, x) voxels of the {wanted} that its block has"
            )
