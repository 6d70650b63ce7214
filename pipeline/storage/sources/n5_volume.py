"""N5 arrays and multiscale groups (s0, s1, ...) as levels to read. In N5's metadata x comes first.

tensorstore gets only metadata that were checked here: it refuses keys that it does not know, and other languages'
libraries write such keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.base.errors import SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.waits import heartbeat, waiting
from pipeline.config.urls import local_path
from pipeline.storage.sources.axes import find_zyx
from pipeline.storage.sources.metadata import Folder, Metadata, inner_path
from pipeline.storage.sources.n5_attributes import Attributes
from pipeline.storage.sources.n5_blocks import WholeBlocks
from pipeline.storage.sources.n5_lz4 import open_lz4
from pipeline.storage.sources.voxel_array import Level, VoxelArray, open_array

_COMPRESSIONS: dict[str, dict[str, Any]] = {
    "raw": {},
    "gzip": {},
    "bzip2": {},
    "xz": {},
    "blosc": {"cname": "zstd", "clevel": 1, "shuffle": 0},
    "zstd": {},
    "lz4": {},
}
"""What is read, and the members that tensorstore wants; it reads all but lz4. Levels and the like decide nothing when a
block is read."""
_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64")
_MAX_LEVELS = 64
_MAX_FOLDERS = 2000
"""Folders of a group that are looked into for arrays."""
_MAX_NAMED = 6
"""Arrays and groups that a message names."""
_USUAL = (
    "s0",
    "timepoint0/s0",
    "setup0/timepoint0/s0",
    "c0/s0",
    "data/s0",
    "raw",
    "raw/s0",
    "volumes/raw",
    "volumes/raw/s0",
    "em/fibsem-uint8/s0",
    "em/fibsem-uint16/s0",
)
"""Where N5 containers have their image, by BigDataViewer, n5-viewer, Paintera, funlib and CellMap."""


def find(folder: Folder, mip: int, array: str | None) -> Level | None:
    """The level that `mip` or `array` names; None where no N5 is at the url. Raises SourceError, TransientError."""
    root = folder.metadata("attributes.json")
    if array is not None:
        return _named(folder, root, mip, array)
    if root is not None and _is_array(root):
        if mip:
            raise SourceError(f"{folder.url} has 1 level, source.mip is {mip}", "0")
        return _level(folder, "", root, [])
    found = folder.metadata(f"s{mip}/attributes.json") if mip < _MAX_LEVELS else None
    if found is not None and _is_array(found):
        return _level(folder, f"s{mip}", found, [root] if root else [])
    count = next((n for n in range(_MAX_LEVELS) if folder.data(f"s{n}/attributes.json") is None), _MAX_LEVELS)
    if count and found is None:
        raise SourceError(
            f"{folder.url} has {count} level{'s' * (count > 1)}, source.mip is {mip}", f"0 to {count - 1}"
        )
    inside = _inside(folder)
    if root is None and not inside and not count:
        return None
    place = f"{folder.url}/s{mip}" if count else folder.url
    raise SourceError(
        f"{place} is an N5 group without dimensions or a level s0", "an array or a group of levels", inside
    )


def _named(folder: Folder, root: Metadata | None, mip: int, array: str) -> Level | None:
    path = inner_path(array, SourceError(f"source.array is {array!r}", "a path inside the group"))
    found = folder.metadata(f"{path}/attributes.json")
    inside = "" if found is not None else _inside(folder)
    if root is None and found is None and not inside:
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
        if found is not None:
            inside = _inside(Folder(f"{folder.url}/{path}"), f"{path}/")
        raise SourceError(
            f"source.array is {array!r}, and {saw}", "an array", inside or "Check the name, or append it to source.url"
        )
    names = path.split("/")
    above = ["/".join([*names[:depth], "attributes.json"]) for depth in range(len(names) - 1, 0, -1)]
    groups = [group for key in above if (group := folder.metadata(key)) is not None]
    return _level(folder, path, found, groups + ([root] if root else []))


def _is_array(found: Metadata) -> bool:
    """Whether these are an array's attributes. A BigDataViewer setup has a dataType and no dimensions."""
    return any(key in found for key in ("dimensions", "blockSize"))


def _inside(folder: Folder, prefix: str = "") -> str:
    """Advice that names the arrays and groups of levels inside a group; empty where none are found."""
    arrays = sorted(_arrays(folder))
    places = list(dict.fromkeys(re.sub(r"(^|/)s\d+$", "", path) for path in arrays))
    appended = [place for place in places if place]
    if not appended:
        return f"Name one by source.array: {_listed(prefix + path for path in arrays)}" if arrays else ""
    first = next(path for path in arrays if path.startswith(appended[0]))
    append = f"one to source.url: {_listed(appended)}" if len(appended) > 1 else f"{appended[0]} to source.url"
    return f"Append {append}; or name an array by source.array: {prefix}{first}"


def _listed(names: Any) -> str:
    every = list(names)
    return ", ".join(every[:_MAX_NAMED]) + (f" and {len(every) - _MAX_NAMED} more" if len(every) > _MAX_NAMED else "")


def _arrays(folder: Folder) -> Iterator[str]:
    """The paths of arrays below a group: by looking into its folders, or behind a server at the usual places."""
    root = local_path(folder.url)
    with waiting(folder.url):
        paths = list(_USUAL if root is None else _folders(root))
    for path in paths:
        try:
            found = folder.metadata(f"{path}/attributes.json")
        except SourceError:
            continue
        if found is not None and _is_array(found):
            yield path


def _folders(root: Path) -> Iterator[str]:
    """The folders below `root` that may be arrays: those with attributes. Folders of blocks, called by numbers, are
    left out.
    """
    for looked_into, (folder, folders, files) in enumerate(os.walk(root)):
        heartbeat()
        folders[:] = sorted(name for name in folders if not name.isdecimal())
        if looked_into >= _MAX_FOLDERS:
            return
        if "attributes.json" in files and Path(folder) != root:
            yield Path(folder).relative_to(root).as_posix()


def _level(folder: Folder, path: str, found: Metadata, groups: list[Metadata]) -> Level:
    dimensions = found.integers("dimensions", low=1)
    rank = len(dimensions)
    block = found.integers("blockSize", rank, low=1, high=2**31 - 1)
    dtype = found.text("dataType").lower()
    if dtype not in _DTYPES:
        raise found.wrong("dataType", f"one of {', '.join(_DTYPES)}")
    stated, readable = _compression(found)
    name = path.rpartition("/")[2]
    attributes = Attributes(found, groups, name, int(name[1:]) if re.fullmatch(r"s\d+", name) else None)
    place = f"{folder.url}/{path}".rstrip("/")
    zyx = find_zyx(attributes.axes(rank), dimensions, place, x_first=True)
    size, corner = attributes.placement(zyx, rank)
    identity = {"dimensions": dimensions, "blockSize": block, "dataType": dtype}
    return Level(
        url=folder.url,
        place=place,
        format="n5",
        spec={
            "driver": "n5",
            "kvstore": folder.spec(path),
            "metadata": identity | {"compression": readable},
            "assume_metadata": True,
        },
        zyx=zyx,
        bounds=Box(ZYX(0, 0, 0), ZYX.of([dimensions[axis] for axis in zyx])),
        chunk=ZYX.of([block[axis] for axis in zyx]),
        stored_chunk=tuple(block),
        dtype=dtype,
        voxel_size_nm=size,
        corner_voxels=corner,
        notes=attributes.notes(corner),
        identity=identity | {"compression": stated},
        metadata_key=(f"{path}/" if path else "") + "attributes.json",
        reader="imagecodecs" if readable["type"] == "lz4" else "tensorstore",
        opener=partial(_open, folder, path, readable["type"]),
    )


def _open(folder: Folder, path: str, compression: str, level: Level) -> VoxelArray:
    if compression == "lz4":
        return open_lz4(level, path)
    return WholeBlocks(folder, path, level, open_array(level))


def _compression(found: Metadata) -> tuple[Any, dict[str, Any]]:
    """The value of `compression`, or of `compressionType` before N5 2.0, and the same for tensorstore. Raises
    SourceError for one that cannot be read.
    """
    key = "compressionType" if "compression" not in found and "compressionType" in found else "compression"
    stated = found.values.get(key)
    holder, name = (found.child(key), "type") if isinstance(stated, dict) else (found, key)
    kind = holder.text(name).lower()
    if kind not in _COMPRESSIONS:
        raise holder.wrong(name, f"one of {', '.join(_COMPRESSIONS)}", "Re-encode it with gzip or zstd")
    readable = {"type": kind} | _COMPRESSIONS[kind]
    if kind == "gzip" and holder.values.get("useZlib"):
        readable["useZlib"] = True
    return stated, readable
