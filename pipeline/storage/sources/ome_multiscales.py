"""OME-NGFF 0.4 and 0.5 multiscales: the levels' paths, axes, voxel sizes and positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.base.errors import SourceError
from pipeline.storage.sources.axes import nm_per
from pipeline.storage.sources.metadata import Metadata, inner_path

_VERSIONS = ("0.4", "0.5")


@dataclass(frozen=True)
class OmeLevel:
    """One dataset of a multiscale: its path, and for each axis a name, a unit, a scale and a translation in that unit.

    The translation is that of the first voxel's centre. `scale` is None where the metadata states none.
    """

    path: str
    names: tuple[str, ...]
    units: tuple[str | None, ...]
    scale: tuple[float, ...] | None
    translation: tuple[float, ...]

    def size_nm(self, zyx: tuple[int, int, int]) -> tuple[float, float, float] | None:
        """The voxel size in nm of the axes at indices `zyx`; None where one has no scale or no unit of length."""
        factors = [nm_per(self.units[axis]) for axis in zyx]
        if self.scale is None or None in factors:
            return None
        z, y, x = (self.scale[axis] * (factor or 0) for axis, factor in zip(zyx, factors, strict=True))
        return z, y, x

    def corner_voxels(self, zyx: tuple[int, int, int]) -> tuple[float, float, float]:
        """The lower corner of voxel 0 in voxels, half a voxel below its centre, which the translation states."""
        z, y, x = (self.translation[axis] / (self.scale[axis] if self.scale else 1) - 0.5 for axis in zyx)
        return z, y, x


def multiscales(attributes: Metadata) -> list[OmeLevel] | None:
    """The levels of a group with these attributes (Zarr v3) or .zattrs (Zarr v2); None where it is no OME-Zarr.

    Raises SourceError for other versions than 0.4 and 0.5 and for damaged metadata.
    """
    holder = attributes.child("ome") if "ome" in attributes else attributes
    if "multiscales" not in holder:
        return None
    first = holder.children("multiscales")[0]
    for named in (holder, first):
        if "version" in named and named.text("version") not in _VERSIONS:
            raise named.wrong(
                "version", f"OME-Zarr {' or '.join(_VERSIONS)}", "Convert it, or name one level's array by source.array"
            )
    axes = first.children("axes") if "axes" in first else []
    if not axes:
        raise first.wrong(
            "axes",
            "axes with names (OME-Zarr 0.4 and later have them)",
            "Convert it, or name one level's array by source.array",
        )
    names = tuple(axis.text("name").lower() for axis in axes)
    units = tuple(axis.text("unit") if "unit" in axis else None for axis in axes)
    after = _transforms(first, len(names))
    return [_level(dataset, names, units, after) for dataset in first.children("datasets")]


def _level(
    dataset: Metadata, names: tuple[str, ...], units: tuple[str | None, ...], after: list[tuple[str, list[float]]]
) -> OmeLevel:
    path = inner_path(dataset.text("path"), dataset.wrong("path", "a path inside the group"))
    own = _transforms(dataset, len(names))
    scale, translation = [1.0] * len(names), [0.0] * len(names)
    for kind, values in [*own, *after]:
        if kind == "scale":
            scale = [s * v for s, v in zip(scale, values, strict=True)]
            translation = [t * v for t, v in zip(translation, values, strict=True)]
        else:
            translation = [t + v for t, v in zip(translation, values, strict=True)]
    if not all(math.isfinite(v) for v in [*scale, *translation]) or min(scale) <= 0:
        raise dataset.wrong("coordinateTransformations", "scales whose product is a positive number")
    stated = any(kind == "scale" for kind, _ in own)
    return OmeLevel(path, names, units, tuple(scale) if stated else None, tuple(translation))


def _transforms(holder: Metadata, rank: int) -> list[tuple[str, list[float]]]:
    """Scales and translations in the order in which they are applied."""
    if "coordinateTransformations" not in holder:
        return []
    found = []
    for transform in holder.children("coordinateTransformations"):
        kind = transform.text("type")
        if kind == "identity":
            continue
        if kind not in ("scale", "translation") or kind not in transform:
            raise transform.wrong(
                "type", "scale or translation with their numbers in place (no path)", "Write the transformation out"
            )
        found.append((kind, transform.numbers(kind, rank, positive=kind == "scale")))
    return found


def pick(levels: list[OmeLevel], mip: int, place: str) -> OmeLevel:
    """The level number `mip`. Raises SourceError where there are not so many."""
    if mip >= len(levels):
        raise SourceError(
            f"{place} has {len(levels)} level{'s' * (len(levels) > 1)}, source.mip is {mip}", f"0 to {len(levels) - 1}"
        )
    return levels[mip]
