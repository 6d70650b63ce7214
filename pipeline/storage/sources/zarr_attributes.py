"""Axis names, voxel size and position that other laboratories' tools write into the attributes of a Zarr array."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.storage.sources.axes import nm_per
from pipeline.storage.sources.metadata import Metadata

Triple = tuple[float, float, float]
_SIZE_KEYS = ("voxel_size", "resolution")
_OF_N5_TOOLS = ("downsamplingFactors", "painteraData", "multiScale", "maxNumEntries")
"""Attributes of Java's N5 tools, which write numbers x first into Zarr arrays too."""
_SMALLEST, _LARGEST = 1e-9, 1e15
"""Sizes below and numbers beyond are no sizes and positions."""
_WITH_UNIT = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)?\s*([^\W\d]*)\s*")
"""tensorstore's text of a dimension's unit: "40 nm", or "nm" alone."""


@dataclass(frozen=True)
class Place:
    """What attributes say of an array's voxels.

    `size_nm` (z, y, x) is None where no unit of length stands beside it; then `unitless` is the size in that unknown
    unit, if there is one. `corner_voxels` is as in `Level`. `seen` says what was found and is of no use without more,
    and `notes` what is not taken.
    """

    size_nm: Triple | None = None
    unitless: Triple | None = None
    corner_voxels: Triple | None = None
    seen: str = ""
    notes: tuple[str, ...] = ()


def axis_names(attributes: Metadata, rank: int) -> list[str | None] | None:
    """funlib's `axis_names`, in which a trailing ^ marks an axis that is not of space; the axes of `transform`."""
    transform = attributes.values.get("transform")
    axes = _as_stored(transform.get("axes"), transform) if isinstance(transform, dict) else None
    for value in (attributes.values.get("axis_names"), axes):
        if isinstance(value, list) and len(value) == rank and all(isinstance(name, str) for name in value):
            return [name.rstrip("^") for name in value]
    return None


def place(attributes: Metadata, zyx: tuple[int, int, int], rank: int) -> Place:
    """What the attributes say of voxel size and position. `zyx` are the indices of the array's axes z, y, x.

    Read are `transform` {axes, scale, translate, units, order} (fibsem-tools; it states a voxel's centre; with order F
    every list has the array's last axis first), `voxel_size` or
    `resolution` with `offset` and `units` (gunpowder, funlib; the corner), `dimension_units` (tensorstore), and an
    isotropic `pixelResolution` {dimensions, unit}.
    """
    transform = attributes.values.get("transform")
    if isinstance(transform, dict) and "scale" in transform:
        return _transform(transform, zyx, rank)
    key = next((key for key in _SIZE_KEYS if key in attributes), None)
    if key is not None or "offset" in attributes:
        return _funlib(attributes, key, zyx, rank)
    if "dimension_units" in attributes:
        return _dimension_units(attributes.values["dimension_units"], zyx, rank)
    pixel = attributes.values.get("pixelResolution")
    return _pixel_resolution(pixel, zyx, rank) if isinstance(pixel, dict) else Place()


def _transform(transform: dict[str, Any], zyx: tuple[int, int, int], rank: int) -> Place:
    transform = {key: _as_stored(value, transform) for key, value in transform.items()}
    axes = transform.get("axes")
    order, count = zyx, rank
    if isinstance(axes, list) and all(isinstance(name, str) for name in axes):
        lower = [name.lower() for name in axes]
        if sorted(name for name in lower if name in ("z", "y", "x")) == ["x", "y", "z"]:
            order, count = (lower.index("z"), lower.index("y"), lower.index("x")), len(axes)
    scale = _numbers(transform.get("scale"), order, count)
    if scale is None or min(scale) < _SMALLEST:
        return Place(notes=(f"its attribute transform has scale {transform.get('scale')}, which is not taken",))
    stated = transform.get("translate", transform.get("translation"))
    translate = _numbers(stated, order, count)
    factors = _factors(transform.get("units"), order, count)
    corner = None if translate is None else _triple(t / s - 0.5 for t, s in zip(translate, scale, strict=True))
    notes = () if stated is None or corner else (f"its attribute transform has translate {stated}, which is not taken",)
    return _place(f"transform with scale {transform['scale']}", scale, factors, corner, notes)


def _funlib(attributes: Metadata, key: str | None, zyx: tuple[int, int, int], rank: int) -> Place:
    stated = attributes.values.get("offset")
    size = None if key is None else _numbers(attributes.values[key], zyx, rank)
    offset = _numbers(stated, zyx, rank)
    moved = stated is not None and (offset is None or any(offset))
    if key is None or size is None or min(size) < _SMALLEST:
        notes = () if key is None else (f"its attribute {key} = {attributes.values[key]} is not taken",)
        return Place(notes=(*notes, f"its attribute offset = {stated} is not taken") if moved else notes)
    corner = None if offset is None else _triple(o / s for o, s in zip(offset, size, strict=True))
    notes = (f"its attribute offset = {stated} is not taken",) if moved and corner is None else ()
    axes = attributes.values.get("axes")
    if min(size) < max(size) and (axes in (["x", "y", "z"], "xyz") or any(name in attributes for name in _OF_N5_TOOLS)):
        return Place(seen=f"its {key} is {attributes.values[key]}, which N5 tools write x first", notes=notes)
    factors = _factors(attributes.values.get("units", attributes.values.get("unit")), zyx, rank)
    return _place(f"{key} {attributes.values[key]}", size, factors, corner, notes)


def _dimension_units(value: Any, zyx: tuple[int, int, int], rank: int) -> Place:
    sizes = list[float]()
    for axis in zyx if isinstance(value, list) and len(value) == rank else ():
        unit = value[axis]
        found = _WITH_UNIT.fullmatch(unit) if isinstance(unit, str) else None
        factor = nm_per(found[2]) if found else None
        if found is not None and factor is not None:
            sizes.append(float(found[1] or 1) * factor)
    return (
        Place(size_nm=_triple(sizes))
        if len(sizes) == 3 and _SMALLEST < min(sizes) <= max(sizes) < _LARGEST
        else Place()
    )


def _pixel_resolution(pixel: dict[str, Any], zyx: tuple[int, int, int], rank: int) -> Place:
    size = _numbers(pixel.get("dimensions"), zyx, rank)
    if size is None or min(size) < _SMALLEST:
        return Place()
    if min(size) < max(size):
        return Place(seen=f"its pixelResolution is {pixel['dimensions']}, which some write x first and some z first")
    return _place(f"pixelResolution {pixel['dimensions']}", size, _factors(pixel.get("unit"), zyx, rank), None, ())


def _place(
    what: str, size: Triple, factors: Sequence[float | None], corner: Triple | None, notes: tuple[str, ...]
) -> Place:
    in_nm = [s * f for s, f in zip(size, factors, strict=True) if f is not None]
    if len(in_nm) == 3:
        return Place(_triple(in_nm), None, corner, "", notes)
    return Place(None, size, corner, f"its attributes have {what} without a unit of length", notes)


def _numbers(value: Any, order: tuple[int, int, int], count: int) -> Triple | None:
    """The numbers (z, y, x) of a list for `count` axes, or for z, y and x alone in the order of the stored axes."""
    if not isinstance(value, list) or not all(_number(v) for v in value) or len(value) not in (count, 3):
        return None
    return _triple(value[axis] for axis in _places(order, count, len(value)))


def _factors(units: Any, order: tuple[int, int, int], count: int) -> list[float | None]:
    """nm per unit of z, y and x; `units` is one text or a list as in `_numbers`."""
    if isinstance(units, list) and len(units) in (count, 3):
        return [nm_per(units[axis]) for axis in _places(order, count, len(units))]
    return [nm_per(units)] * 3


def _places(order: tuple[int, int, int], count: int, length: int) -> Sequence[int]:
    return order if length == count else [sorted(order).index(axis) for axis in order]


def _as_stored(value: Any, transform: dict[str, Any]) -> Any:
    """A list of `transform` in the order of the stored axes."""
    reverse = isinstance(value, list) and "F" in (transform.get("order"), transform.get("ordering"))
    return value[::-1] if reverse else value


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _triple(values: Any) -> Triple:
    z, y, x = (float(value) for value in values)
    return z, y, x
