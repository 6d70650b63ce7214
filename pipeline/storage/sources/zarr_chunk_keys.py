"""Under which names a Zarr array's chunks are stored, and whether they lie there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.base.errors import SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.storage.sources.metadata import Folder

_LOOKED_AT = 8
"""Chunks of a box with a hole that are looked for under other names."""


@dataclass(frozen=True)
class ChunkKeys:
    """The names of a Zarr array's chunks (of shards, where it has them).

    `folder` is the array's path below the volume, "" or ending in "/"; `shape` is the shape of a chunk and `zyx` the
    indices of the axes z, y, x, both in stored order.
    """

    folder: str
    prefix: str
    separator: str
    shape: tuple[int, ...]
    zyx: tuple[int, int, int]

    def name(self, index: Sequence[int]) -> str:
        """The key of the chunk at this place of the grid, all axes in stored order."""
        return f"{self.folder}{self.prefix}{self.separator.join(map(str, index))}"

    def at(self, position: ZYX) -> str:
        """The key of the chunk at this position (z, y, x) of the grid."""
        index = [0] * len(self.shape)
        for axis, number in zip(self.zyx, position, strict=True):
            index[axis] = number
        return self.name(index)

    def all_of(self, box: Box) -> Iterable[str]:
        """The keys of all chunks that `box` touches."""
        ranges = [range(1)] * len(self.shape)
        for axis, first, stop in zip(self.zyx, box.start, box.stop, strict=True):
            ranges[axis] = range(first // self.shape[axis], -(-stop // self.shape[axis]))
        return map(self.name, itertools.product(*ranges))

    def others(self) -> list[ChunkKeys]:
        """The other ways in which writers name such chunks."""
        ways = [("", "."), ("", "/"), *([("c/", "/"), ("c.", ".")] if self.prefix else [])]
        return [
            ChunkKeys(self.folder, prefix, separator, self.shape, self.zyx)
            for prefix, separator in ways
            if (prefix, separator) != (self.prefix, self.separator)
        ]


def stored_separator(holds: Callable[[str], bool], keys: ChunkKeys, shape: Sequence[int]) -> str:
    """The separator under which a Zarr v2 array of `shape` has its first, middle or last chunk: old writers of nested
    folders say nothing of it in .zarray, which means ".".

    Where none of these chunks is stored, it is the one that the metadata state. `holds` tells whether a key is stored.
    """
    other = "/" if keys.separator == "." else "."
    moved = ChunkKeys(keys.folder, keys.prefix, other, keys.shape, keys.zyx)
    counts = [-(-n // m) for n, m in zip(shape, keys.shape, strict=True)]
    places = (tuple(0 for _ in counts), tuple(n // 2 for n in counts), tuple(n - 1 for n in counts))
    for index in dict.fromkeys(places):
        if holds(keys.name(index)):
            return keys.separator
        if holds(moved.name(index)):
            return other
    return keys.separator


def refuse_other_names(folder: Folder, keys: ChunkKeys, box: Box) -> None:
    """Raises SourceError where a chunk of `box` is stored under a name that the metadata do not say."""
    for other in keys.others():
        for stated, name in itertools.islice(zip(keys.all_of(box), other.all_of(box), strict=True), _LOOKED_AT):
            if folder.holds(name) and not folder.holds(stated):
                raise SourceError(
                    f"{folder.url} has a chunk at {name}, where its metadata say {stated}",
                    "chunks under one kind of name",
                    f'Write the separator "{other.separator}" into its metadata (dimension_separator in .zarray), or '
                    "copy the chunks to names of one kind",
                )
