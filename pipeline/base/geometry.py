"""Integer points and half-open boxes in (z, y, x) order. Imports nothing of the project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class ZYX:
    """Three integers in (z, y, x) order with element-wise arithmetic; an int operand counts for all three."""

    z: int
    y: int
    x: int

    @classmethod
    def of(cls, values: Sequence[int]) -> ZYX:
        """From any three whole numbers, numpy's included. Raises ValueError for another count."""
        z, y, x = (int(v) for v in values)
        return cls(z, y, x)

    def __iter__(self) -> Iterator[int]:
        yield self.z
        yield self.y
        yield self.x

    def _each(self, other: ZYX | int, op: Callable[[int, int], int]) -> ZYX:
        o = ZYX(other, other, other) if isinstance(other, int) else other
        return ZYX(op(self.z, o.z), op(self.y, o.y), op(self.x, o.x))

    def __add__(self, other: ZYX | int) -> ZYX:
        return self._each(other, lambda a, b: a + b)

    def __sub__(self, other: ZYX | int) -> ZYX:
        return self._each(other, lambda a, b: a - b)

    def __mul__(self, other: ZYX | int) -> ZYX:
        return self._each(other, lambda a, b: a * b)

    def __floordiv__(self, other: ZYX | int) -> ZYX:
        return self._each(other, lambda a, b: a // b)

    def __mod__(self, other: ZYX | int) -> ZYX:
        return self._each(other, lambda a, b: a % b)

    def ceil_div(self, other: ZYX | int) -> ZYX:
        """Element-wise quotient rounded up."""
        return self._each(other, lambda a, b: -(-a // b))

    def minimum(self, other: ZYX | int) -> ZYX:
        return self._each(other, min)

    def maximum(self, other: ZYX | int) -> ZYX:
        return self._each(other, max)

    @property
    def product(self) -> int:
        return self.z * self.y * self.x

    def lateral(self, factor: int) -> ZYX:
        """y and x multiplied by `factor`, z kept: LR to SR."""
        return ZYX(self.z, self.y * factor, self.x * factor)

    def __str__(self) -> str:
        return f"({self.z}, {self.y}, {self.x})"


@dataclass(frozen=True, slots=True)
class Box:
    """Half-open box: start <= voxel < stop on every axis. Empty where stop <= start."""

    start: ZYX
    stop: ZYX

    @classmethod
    def of(cls, start: Sequence[int], stop: Sequence[int]) -> Box:
        return cls(ZYX.of(start), ZYX.of(stop))

    @classmethod
    def at(cls, start: ZYX, shape: ZYX) -> Box:
        return cls(start, start + shape)

    @property
    def shape(self) -> ZYX:
        return (self.stop - self.start).maximum(0)

    @property
    def size(self) -> int:
        """Voxels inside."""
        return self.shape.product

    @property
    def empty(self) -> bool:
        return self.size == 0

    def grow(self, margin: ZYX | int) -> Box:
        """The box with `margin` voxels more on either side of every axis."""
        return Box(self.start - margin, self.stop + margin)

    def shift(self, by: ZYX) -> Box:
        return Box(self.start + by, self.stop + by)

    def intersect(self, other: Box) -> Box:
        """The voxels in both boxes; empty, with stop == start on some axis, where there are none."""
        start = self.start.maximum(other.start)
        return Box(start, self.stop.minimum(other.stop).maximum(start))

    def contains(self, other: Box) -> bool:
        """Whether every voxel of `other` is in this box: an empty box is in every box."""
        return other.empty or self.intersect(other) == other

    def lateral(self, factor: int) -> Box:
        """The same region on a grid `factor` times finer in y and x."""
        return Box(self.start.lateral(factor), self.stop.lateral(factor))

    def coarser(self, factor: int) -> Box:
        """The region on a grid `factor` times coarser in y and x, rounded outwards."""
        f = ZYX(1, factor, factor)
        return Box(self.start // f, self.stop.ceil_div(f))

    def slices(self, origin: ZYX | None = None) -> tuple[slice, slice, slice]:
        """The index of this box in an array (z, y, x) whose first voxel is `origin` (default: voxel 0)."""
        o = origin or ZYX(0, 0, 0)
        return (
            slice(self.start.z - o.z, self.stop.z - o.z),
            slice(self.start.y - o.y, self.stop.y - o.y),
            slice(self.start.x - o.x, self.stop.x - o.x),
        )

    def __str__(self) -> str:
        return f"{self.start}..{self.stop}"


def grid_parts(box: Box, shape: ZYX) -> Iterator[Box]:
    """The parts of `box` cut by the grid of `shape` anchored at voxel (0, 0, 0), in z, y, x order."""
    first, last = box.start // shape, box.stop.ceil_div(shape)
    if box.empty:
        return
    for z in range(first.z, last.z):
        for y in range(first.y, last.y):
            for x in range(first.x, last.x):
                yield Box.at(ZYX(z, y, x) * shape, shape).intersect(box)


def chunk_count(box: Box, shape: ZYX) -> int:
    """How many cells of the grid of `shape`, anchored at voxel (0, 0, 0), the box overlaps."""
    return 0 if box.empty else (box.stop.ceil_div(shape) - box.start // shape).product
