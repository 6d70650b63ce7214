"""Voxel sizes and positions in N5 attributes, as n5-viewer, Paintera, BigDataViewer, CellMap and funlib state them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.base.errors import SourceError
from pipeline.storage.sources import ome_multiscales
from pipeline.storage.sources.axes import nm_per
from pipeline.storage.sources.metadata import Metadata

_MIN_NM = 0.1
"""A voxel size without a unit is in nm. One that would be smaller than an atom is in another unit, which nobody states.
"""
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Attributes:
    """The attributes that tell of one array: its own, and those of the groups above it, the nearest first.

    `name` is the array's last path component, `number` its level number; None where that is no level.
    """

    own: Metadata
    groups: Sequence[Metadata]
    name: str
    number: int | None

    def axes(self, rank: int) -> list[str] | None:
        """The names of the axes in stored order; None where none are stated."""
        stated = self.own.values.get("axes")
        if isinstance(stated, str):
            stated = list(stated)
        if isinstance(stated, list) and all(isinstance(axis, dict) for axis in stated):
            stated = [axis.get("name") for axis in stated]
        if stated is None:
            transform = self._transform()
            return None if transform is None else _stored_order(transform, _words(transform, "axes", rank))
        return _words(Metadata({"axes": stated}, self.own.place), "axes", rank)

    def placement(self, zyx: tuple[int, int, int], rank: int) -> tuple[Triple | None, Triple | None]:
        """The voxel size (z, y, x) in nm, and the lower corner of voxel (0, 0, 0) in voxels; None for what is not
        stated. `zyx` are the indices of the axes in stored order. Raises SourceError.
        """
        transform = self._transform()
        if transform is not None:
            return _by_transform(transform, rank)
        size, corner = self._by_multiscales()
        if size is None:
            size = self._voxel_size(zyx, rank)
            corner = None if size is None else self._corner(zyx, rank, size)
        return size, corner

    def notes(self, corner: Triple | None) -> tuple[str, ...]:
        """What is stated of a position and cannot be taken, since no size with a unit stands beside it."""
        stated = next((h.values["offset"] for h in (self.own, *self.groups) if "offset" in h), None)
        moved = any(stated) if isinstance(stated, list) else stated is not None
        return (f"its attribute offset = {stated} is not taken",) if moved and corner is None else ()

    def _transform(self) -> Metadata | None:
        """CellMap's `transform`, of the array or of its entry in the group's multiscales."""
        for holder in (self.own, *self._datasets()):
            if isinstance(holder.values.get("transform"), dict) and "scale" in holder.child("transform"):
                return holder.child("transform")
        return None

    def _datasets(self) -> list[Metadata]:
        for group in self.groups:
            try:
                datasets = group.children("multiscales")[0].children("datasets")
            except SourceError:
                continue
            return [entry for entry in datasets if entry.values.get("path") == self.name]
        return []

    def _by_multiscales(self) -> tuple[Triple | None, Triple | None]:
        """By OME-NGFF's multiscales in a group's attributes. What OME-NGFF does not know decides nothing here."""
        for group in self.groups:
            try:
                levels = ome_multiscales.multiscales(group) or []
            except SourceError:
                continue
            for level in levels:
                if level.path == self.name and {"z", "y", "x"} <= set(level.names):
                    axes = (level.names.index("z"), level.names.index("y"), level.names.index("x"))
                    return level.size_nm(axes), level.corner_voxels(axes)
        return None, None

    def _voxel_size(self, zyx: tuple[int, int, int], rank: int) -> Triple | None:
        """The array's own resolution, or its group's, times the array's downsamplingFactors or the group's scales."""
        own = _resolution(self.own, zyx, rank)
        base = own or next((found for group in self.groups if (found := _resolution(group, zyx, rank))), None)
        if base is None:
            return None
        if "downsamplingFactors" in self.own:
            factors = _spatial(self.own, "downsamplingFactors", zyx, rank)
        elif own is None:
            listed = self._listed_factors(zyx, rank)
            if listed is None and self.number != 0:
                return None
            factors = listed or (1.0, 1.0, 1.0)
        else:
            factors = (1.0, 1.0, 1.0)
        z, y, x = (size * factor for size, factor in zip(base, factors, strict=True))
        return z, y, x

    def _listed_factors(self, zyx: tuple[int, int, int], rank: int) -> Triple | None:
        """This level's entry in a group's list of factors: `scales`, or `downsamplingFactors` of a BigDataViewer
        setup.
        """
        for group in self.groups:
            for key in ("scales", "downsamplingFactors"):
                if self.number is not None and key in group:
                    every = group.values[key]
                    if not isinstance(every, list) or self.number >= len(every):
                        raise group.wrong(key, "a list with the factors of every level")
                    entry = Metadata({key: every[self.number]}, f"{group.place} {key}[{self.number}]")
                    return _spatial(entry, key, zyx, rank)
        return None

    def _corner(self, zyx: tuple[int, int, int], rank: int, size: Triple) -> Triple | None:
        """By `offset` (funlib, CREMI, Paintera), the lower corner in the unit of the resolution beside it."""
        for holder in (self.own, *self.groups):
            if "offset" in holder:
                factors = _unit_factors(holder, zyx, rank) or (1.0, 1.0, 1.0)
                offset = _spatial(holder, "offset", zyx, rank, positive=False)
                z, y, x = (o * f / s for o, f, s in zip(offset, factors, size, strict=True))
                return z, y, x
        return None


def _by_transform(transform: Metadata, rank: int) -> tuple[Triple | None, Triple | None]:
    """`translate` is the position of the first voxel's centre."""
    names = [name.lower() for name in _words(transform, "axes", rank) or ()]
    if not {"z", "y", "x"} <= set(names):
        in_order = ["z", "y", "x"] if transform.values.get("ordering") != "F" else ["x", "y", "z"]
        names = in_order if rank == 3 else []
    if not names:
        raise transform.wrong("axes", "the names of all axes, z, y and x among them")
    axes = (names.index("z"), names.index("y"), names.index("x"))
    scale = transform.numbers("scale", rank, positive=True)
    moved = transform.numbers("translate", rank) if "translate" in transform else [0.0] * rank
    corner = tuple(moved[axis] / scale[axis] - 0.5 for axis in axes)
    factors = [nm_per(unit) for unit in _words(transform, "units", rank) or ["nm"] * rank]
    size = tuple(scale[axis] * (factors[axis] or 0) for axis in axes)
    return (size[0], size[1], size[2]) if min(size) > 0 else None, (corner[0], corner[1], corner[2])


def _stored_order(transform: Metadata, names: list[str] | None) -> list[str] | None:
    """The names as stored: N5 lists the axis first that NumPy lists last."""
    if names is None or not {"z", "y", "x"} <= {name.lower() for name in names}:
        return None
    return names if transform.values.get("ordering") == "F" else names[::-1]


def _words(holder: Metadata, key: str, rank: int) -> list[str] | None:
    value = holder.values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != rank or not all(isinstance(v, str) for v in value):
        raise holder.wrong(key, f"{rank} words", f"Correct {key} there, or take it away")
    return value


def _spatial(
    holder: Metadata, key: str, zyx: tuple[int, int, int], rank: int, positive: bool = True
) -> tuple[float, float, float]:
    """The numbers of the axes z, y, x: of a list with one for each axis, or one for each of x, y, z."""
    value = holder.values.get(key)
    if rank > 3 and isinstance(value, list) and len(value) == 3:
        x, y, z = holder.numbers(key, 3, positive)
        return z, y, x
    numbers = holder.numbers(key, rank, positive)
    return numbers[zyx[0]], numbers[zyx[1]], numbers[zyx[2]]


def _unit_factors(holder: Metadata, zyx: tuple[int, int, int], rank: int) -> Triple | None:
    """nm per unit of the axes z, y, x, by `units` or `unit`; None where neither is stated. 0 for no unit of length."""
    stated = holder.values.get("units", holder.values.get("unit"))
    if stated is None:
        return None
    words = [stated] * rank if isinstance(stated, str) else stated
    if isinstance(words, list) and len(words) == 3 and rank > 3:
        x, y, z = (nm_per(word) or 0.0 for word in words)
        return z, y, x
    checked = _words(Metadata({"units": words}, holder.place), "units", rank) or []
    z, y, x = (nm_per(checked[axis]) or 0.0 for axis in zyx)
    return z, y, x


def _resolution(holder: Metadata, zyx: tuple[int, int, int], rank: int) -> Triple | None:
    """nm per voxel (z, y, x); None where none is given, its unit is no unit of length, or it has none and cannot be
    nm.
    """
    key = next((key for key in ("pixelResolution", "resolution") if key in holder), None)
    if key is None:
        return None
    factors = _unit_factors(holder, zyx, rank)
    if isinstance(holder.values[key], dict):
        holder, key = holder.child(key), "dimensions"
        factors = _unit_factors(holder, zyx, rank) or (0.0, 0.0, 0.0)
    sizes = _spatial(holder, key, zyx, rank)
    if factors is None and min(sizes) < _MIN_NM:
        return None
    z, y, x = (size * factor for size, factor in zip(sizes, factors or (1.0, 1.0, 1.0), strict=True))
    return (z, y, x) if min(z, y, x) > 0 else None
