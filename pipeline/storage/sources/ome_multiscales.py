"""OME-NGFF 0.1 to 0.5 multiscales: the levels' paths, axes, voxel sizes and positions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pipeline.base.errors import SourceError
from pipeline.storage.sources.axes import nm_per
from pipeline.storage.sources.metadata import Metadata, inner_path

_VERSION = re.compile(r"0\.([1-5])(\D.*)?")
_AXES_BEFORE_0_3 = ("t", "c", "z", "y", "x")
_BY_ARRAY = "Name one level's array by source.array, with source.voxel_size_nm"


@dataclass(frozen=True)
class OmeLevel:
    """One dataset of a multiscale: its path, and for each axis a name, a unit, a scale and a translation in that unit.

    The translation is that of the first voxel's centre. `scale` is None where the metadata states none. Without axes
    and transformations, as in version 0.1, there is nothing but the path. `dataset` is the entry itself.
    """

    path: str
    names: tuple[str, ...]
    units: tuple[str | None, ...]
    scale: tuple[float, ...] | None
    translation: tuple[float, ...]
    dataset: Metadata

    def size_nm(self, zyx: tuple[int, int, int]) -> tuple[float, float, float] | None:
        """The voxel size in nm of the axes at indices `zyx`; None where one has no scale or no unit of length."""
        if self.scale is None or not self.units:
            return None
        factors = [nm_per(self.units[axis]) for axis in zyx]
        if None in factors:
            return None
        z, y, x = (self.scale[axis] * (factor or 0) for axis, factor in zip(zyx, factors, strict=True))
        return z, y, x

    def unitless(self, zyx: tuple[int, int, int]) -> tuple[float, float, float] | None:
        """The stated scale of z, y and x, whatever its unit."""
        if self.scale is None:
            return None
        z, y, x = (self.scale[axis] for axis in zyx)
        return z, y, x

    def seen(self, zyx: tuple[int, int, int]) -> str:
        """What is stated in place of a voxel size in nm."""
        scale, units = self.unitless(zyx), [self.units[axis] for axis in zyx] if self.units else [None]
        if scale is None:
            return ""
        named = f"; its units are {units}" if any(units) else ""
        return f"it has a scale of {list(scale)} (z, y, x) without a unit of length{named}"

    def corner_voxels(self, zyx: tuple[int, int, int]) -> tuple[float, float, float]:
        """The lower corner of voxel 0 in voxels, half a voxel below its centre, which the translation states."""
        if not self.translation:
            return -0.5, -0.5, -0.5
        z, y, x = (self.translation[axis] / (self.scale[axis] if self.scale else 1) - 0.5 for axis in zyx)
        return z, y, x


def multiscales(attributes: Metadata) -> list[OmeLevel] | None:
    """The levels of a group with these attributes (Zarr v3) or .zattrs (Zarr v2); None where it is no OME-Zarr.

    Raises SourceError for later versions than 0.5 and for damaged metadata.
    """
    holder = attributes.child("ome") if "ome" in attributes else attributes
    if "multiscales" not in holder:
        return None
    first = holder.children("multiscales")[0]
    for named in (holder, first):
        if "version" in named and _VERSION.fullmatch(str(named.values["version"])) is None:
            raise named.wrong("version", "OME-Zarr up to 0.5", _BY_ARRAY)
    datasets = first.children("datasets")
    names, units = _axes(first)
    if not names:
        names = _AXES_BEFORE_0_3[-_rank(first, datasets[0]) :] if _rank(first, datasets[0]) else ()
    after = _transforms(first, len(names))
    return [_level(dataset, number, names, units, after) for number, dataset in enumerate(datasets)]


def _axes(first: Metadata) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Names and units of the axes: objects since version 0.4, names alone in 0.3, nothing before."""
    value = first.values.get("axes") or []
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(name.lower() for name in value), (None,) * len(value)
    axes = first.children("axes")
    units = (axis.values.get("unit") for axis in axes)
    names = tuple(axis.text("name").lower() for axis in axes)
    return names, tuple(unit if isinstance(unit, str) else None for unit in units)


def _rank(first: Metadata, dataset: Metadata) -> int:
    """How many axes the transformations have where `axes` states none; 0 where nothing says so."""
    for holder in (dataset, first):
        transforms = holder.values.get("coordinateTransformations")
        for transform in transforms if isinstance(transforms, list) else []:
            for kind in ("scale", "translation"):
                value = transform.get(kind) if isinstance(transform, dict) else None
                if isinstance(value, list) and 3 <= len(value) <= len(_AXES_BEFORE_0_3):
                    return len(value)
    return 0


def _level(
    dataset: Metadata,
    number: int,
    names: tuple[str, ...],
    units: tuple[str | None, ...],
    after: list[tuple[str, list[float]]],
) -> OmeLevel:
    path = inner_path(dataset.text("path"), dataset.wrong("path", "a path inside the group", _BY_ARRAY))
    own = _transforms(dataset, len(names))
    scale, translation = [1.0] * len(names), [0.0] * len(names)
    for kind, values in [*own, *after]:
        if kind == "scale":
            scale = [s * v for s, v in zip(scale, values, strict=True)]
            translation = [t * v for t, v in zip(translation, values, strict=True)]
        else:
            translation = [t + v for t, v in zip(translation, values, strict=True)]
    if not all(math.isfinite(v) for v in [*scale, *translation]) or min(scale, default=1) <= 0:
        raise dataset.wrong("coordinateTransformations", "scales whose product is a positive number", _BY_ARRAY)
    # what the group states alone is the size of the finest level
    stated = any(kind == "scale" for kind, _ in (own if number else [*own, *after]))
    return OmeLevel(path, names, units, tuple(scale) if stated else None, tuple(translation), dataset)


def _transforms(holder: Metadata, rank: int) -> list[tuple[str, list[float]]]:
    """Scales and translations in the order in which they are applied."""
    if not holder.values.get("coordinateTransformations"):
        return []
    found = []
    for transform in holder.children("coordinateTransformations"):
        kind = transform.text("type")
        if kind == "identity":
            continue
        if kind not in ("scale", "translation") or kind not in transform:
            raise transform.wrong("type", "scale or translation with their numbers in place (no path)", _BY_ARRAY)
        found.append((kind, transform.numbers(kind, rank, kind == "scale", _BY_ARRAY)))
    return found


def pick(levels: list[OmeLevel], mip: int, place: str) -> OmeLevel:
    """The level number `mip`. Raises SourceError where there are not so many."""
    if mip >= len(levels):
        raise SourceError(
            f"{place} has {len(levels)} level{'s' * (len(levels) > 1)}, source.mip is {mip}", f"0 to {len(levels) - 1}"
        )
    return levels[mip]
