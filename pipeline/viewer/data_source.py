"""A volume as Neuroglancer's data source: axis names, voxel size and position as it reads them from the metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.base.geometry import ZYX
from pipeline.viewer import zarr_support

Triple = tuple[float, float, float]
Get = Callable[[str], bytes | None]
Axes = tuple[int, int, int]

# The spellings that Neuroglancer reads: the whole word in OME metadata, the symbol in N5's.
_OME_NM = {
    "angstrom": 0.1,
    "picometer": 1e-3,
    "nanometer": 1.0,
    "micrometer": 1e3,
    "millimeter": 1e6,
    "centimeter": 1e7,
    "meter": 1e9,
}
_N5_NM = {"pm": 1e-3, "nm": 1.0, "um": 1e3, "µm": 1e3, "mm": 1e6, "cm": 1e7, "m": 1e9}
_DECODED = ("raw", "gzip", "zlib", "blosc", "zstd")
_OME_VERSIONS = ("0.4", "0.5-dev", "0.5")
_LEAVES = {"zarr2": ".zarray", "zarr3": "zarr.json"}


@dataclass(frozen=True)
class Native:
    """One level of a volume in Neuroglancer's native coordinates (its term for those of the metadata), all as (z, y,
    x).

    `kind` is Neuroglancer's prefix of the format and `path` the array or group below the volume's URL that the layer
    opens. `names` are Neuroglancer's names of the axes. `voxel_nm` is the voxel size of the finest level, None where
    the metadata gives no length. `start` is the lower corner of the level's first voxel and `step` the size of the
    level's voxel, both in voxels of the finest level. `shape` is the level's, in voxels. `unreadable` says why
    Neuroglancer cannot show the volume; None where no reason is known.
    """

    kind: str
    path: str
    names: tuple[str, str, str]
    voxel_nm: Triple | None
    start: Triple
    step: Triple
    shape: ZYX
    unreadable: str | None = None

    @property
    def corner_nm(self) -> Triple | None:
        """Where Neuroglancer puts the lower corner of the level's first voxel; None if that is unknown."""
        return (
            None if self.voxel_nm is None else _triple([s * v for s, v in zip(self.start, self.voxel_nm, strict=True)])
        )

    @property
    def level_voxel_nm(self) -> Triple | None:
        return (
            None if self.voxel_nm is None else _triple([s * v for s, v in zip(self.step, self.voxel_nm, strict=True)])
        )


def read_native(
    get: Get, kind: str | None = None, level: int = 0, array: str | None = None, zyx: Axes | None = None
) -> Native | None:
    """The level `level` of the volume whose metadata objects `get` returns; None where there is no volume.

    `kind` is the format prefix of the URL, None for any format; `array` is a path below the URL. `zyx` are the indices
    of a Zarr array's axes, for where Neuroglancer reads no names of them; None takes the last three. Raises ValueError,
    KeyError, TypeError or IndexError for metadata that do not follow their format.
    """
    path = (array or "").strip("/")
    below = f"{path}/" if path else ""
    if kind in (None, "precomputed") and (meta := _json(get, f"{below}info")) is not None:
        return _precomputed(path, meta, level)
    if kind in (None, "zarr", "zarr3") and (meta := _json(get, f"{below}zarr.json")) is not None:
        return _zarr(get, "zarr3", path, meta, level, zyx)
    if kind in (None, "zarr", "zarr2"):
        meta = _json(get, f"{below}.zarray")
        if meta is not None or _json(get, f"{below}.zattrs") is not None:
            return _zarr(get, "zarr2", path, meta or {}, level, zyx)
    if kind in (None, "n5"):
        return _n5(get, path, level)
    return None


def _json(get: Get, key: str) -> dict[str, Any] | None:
    raw = get(key)
    if raw is None:
        return None
    value = json.loads(raw)
    if not isinstance(value, dict):
        raise ValueError(f"{key} is no JSON object")
    return value


def _triple(values: Sequence[float]) -> Triple:
    z, y, x = (float(v) for v in values)
    if not all(map(math.isfinite, (z, y, x))):
        raise ValueError("a size or position that is no finite number")
    return z, y, x


def _attributes(get: Get, kind: str, path: str, meta: dict[str, Any]) -> dict[str, Any]:
    """The attributes of the group or array at `path`: Zarr v2 keeps them in an object of their own."""
    below = f"{path}/" if path else ""
    return (_json(get, f"{below}.zattrs") if kind == "zarr2" else meta.get("attributes")) or {}


def _zarr(get: Get, kind: str, path: str, meta: dict[str, Any], level: int, zyx: Axes | None) -> Native:
    attributes = _attributes(get, kind, path, meta)
    if "shape" in meta:
        return _bare_array(get, kind, path, meta, zyx)
    multiscale = ((attributes.get("ome") or attributes)["multiscales"])[0]
    datasets = multiscale["datasets"]
    below = f"{path}/" if path else ""
    array_path = below + datasets[level]["path"].strip("/")
    array_kind, array = kind, _json(get, f"{array_path}/{_LEAVES[kind]}")
    if array is None:
        array_kind = "zarr2" if kind == "zarr3" else "zarr3"
        array = _json(get, f"{array_path}/{_LEAVES[array_kind]}")
    if array is None:
        raise ValueError(f"{array_path}/{_LEAVES[kind]} is absent")
    version = (attributes.get("ome") or multiscale).get("version")
    axes = multiscale.get("axes") or []
    if (
        not axes
        or version not in _OME_VERSIONS
        or (version == "0.5" and kind == "zarr2")
        or array_kind != kind
        or not all(isinstance(axis, dict) and _readable(axis.get("unit")) for axis in axes)
    ):
        # Neuroglancer refuses such a multiscale, but it does open the level's array alone.
        return _bare_array(get, array_kind, array_path, array, zyx)
    spatial = _spatial([str(axis["name"]) for axis in axes])
    units = [axes[i].get("unit") for i in spatial]
    fine, coarse = (_ome_transform(multiscale, datasets[k], len(axes)) for k in (0, level))
    return Native(
        kind,
        path,
        _names([str(axes[i]["name"]) for i in spatial]),
        _triple([fine[i][0] * _OME_NM[u] for i, u in zip(spatial, units, strict=True)])
        if all(u in _OME_NM for u in units)
        else None,
        # OME-NGFF's translation is a voxel's centre, Neuroglancer's coordinates are its lower corner.
        _triple([(coarse[i][1] - coarse[i][0] / 2) / fine[i][0] for i in spatial]),
        _triple([coarse[i][0] / fine[i][0] for i in spatial]),
        ZYX.of([array["shape"][i] for i in spatial]),
        zarr_support.unreadable(kind, array_path, array, get),
    )


def _readable(unit: object) -> bool:
    """Whether Neuroglancer reads this unit of an OME axis."""
    return unit is None or unit in _OME_NM or (isinstance(unit, str) and unit.endswith("second"))


def _ome_transform(multiscale: dict[str, Any], dataset: dict[str, Any], rank: int) -> list[tuple[float, float]]:
    """(scale, translation) of every axis: the dataset's transformations first, then the multiscale's."""
    out = [(1.0, 0.0)] * rank
    for step in [
        *(dataset.get("coordinateTransformations") or []),
        *(multiscale.get("coordinateTransformations") or []),
    ]:
        if step["type"] == "scale":
            out = [(s * float(f), t * float(f)) for (s, t), f in zip(out, step["scale"], strict=True)]
        elif step["type"] == "translation":
            out = [(s, t + float(d)) for (s, t), d in zip(out, step["translation"], strict=True)]
    return out


def _bare_array(get: Get, kind: str, path: str, meta: dict[str, Any], zyx: Axes | None) -> Native:
    """An array without OME metadata: Neuroglancer starts it at 0 and knows no voxel size that we would trust."""
    shape, attributes = meta["shape"], _attributes(get, kind, path, meta)
    given = (attributes.get("_ARRAY_DIMENSIONS") if kind == "zarr2" else meta.get("dimension_names")) or [None] * len(
        shape
    )
    prefix = "d" if kind == "zarr2" else "dim_"
    names = [name if name is not None else f"{prefix}{i}" for i, name in enumerate(given)]
    order = zyx or _spatial(names)
    return Native(
        kind,
        path,
        _names([names[i] for i in order]),
        None,
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        ZYX.of([shape[i] for i in order]),
        zarr_support.unreadable(kind, path, meta, get),
    )


def _coding(compressor: dict[str, Any] | None, key: str) -> str | None:
    """Why Neuroglancer cannot decode the compression that the metadata states under `key`; None where it can."""
    name = compressor[key] if compressor else "raw"
    return None if name in _DECODED else f"compression {name}"


def _precomputed(path: str, info: dict[str, Any], level: int) -> Native:
    fine, scale = info["scales"][0], info["scales"][level]
    voxel = _triple(fine["resolution"][::-1])
    step = _triple([s / f for s, f in zip(_triple(scale["resolution"][::-1]), voxel, strict=True)])
    offset = _triple((scale.get("voxel_offset") or [0, 0, 0])[::-1])
    return Native(
        "precomputed",
        path,
        ("z", "y", "x"),
        voxel,
        _triple([o * s for o, s in zip(offset, step, strict=True)]),
        step,
        ZYX.of([int(float(n)) for n in scale["size"][::-1]]),
    )


def _n5(get: Get, path: str, level: int | None) -> Native | None:
    """The level of an N5 volume, or the array at `path` itself where `level` is None.

    Attributes are inherited from the groups above, and x comes first.
    """
    merged = dict[str, Any]()
    parts = [p for p in path.split("/") if p]
    for depth in range(len(parts) + 1):
        merged |= _json(get, "/".join([*parts[:depth], "attributes.json"])) or {}
    factors: Any = merged.get("scales") or merged.get("downsamplingFactors")
    several = bool(factors) and isinstance(factors[0], list)
    array: dict[str, Any] | None = merged
    if "dimensions" in merged:
        step = factors if factors and not several else [1] * len(merged["dimensions"])
    elif level is None:
        return None
    elif several:
        array, step = _json(get, f"{path}/s{level}/attributes.json".strip("/")), factors[level]
    else:
        # Neuroglancer would list the folder to find the levels, which web servers do not offer: open the level's array.
        return _n5(get, f"{path}/s{level}".strip("/"), None)
    if array is None:
        raise ValueError(f"s{level}/attributes.json is absent")
    size = array["dimensions"]
    pixel = merged.get("pixelResolution") or {}
    compression = array.get("compression") or {"type": array.get("compressionType", "raw")}
    unreadable = _coding(compression, "type") if isinstance(compression, dict) else "a compression that is text"
    if not isinstance(pixel, dict):
        pixel, unreadable = {}, "a pixelResolution that is a list"
    voxel: Any = pixel.get("dimensions") or merged.get("resolution")
    units = [pixel["unit"]] * len(size) if pixel.get("unit") else merged.get("units") or ["nm"] * len(size)
    names = merged.get("axes")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        unreadable = "axes that are no words" if names else unreadable
        names = ["x", "y", "z", "t", "c"][: len(size)]
    if isinstance(units, str):
        units, unreadable = [units] * len(size), "units that are text"
    zyx = _spatial(names, x_first=True)
    strange = [units[i] for i in zyx if units[i] not in _N5_NM]
    if strange:
        unreadable = f"the unit {strange[0]}"
    known = voxel is not None and not strange
    return Native(
        "n5",
        path,
        _names([names[i] for i in zyx]),
        _triple([voxel[i] * _N5_NM[units[i]] for i in zyx]) if known else None,
        (0.0, 0.0, 0.0),
        _triple([step[i] for i in zyx]),
        ZYX.of([size[i] for i in zyx]),
        unreadable,
    )


def _spatial(names: Sequence[str], x_first: bool = False) -> list[int]:
    """Which axes are z, y and x: by name, or else the last three, or with `x_first` the first three as x, y, z."""
    lower = [name.lower() for name in names]
    if all(lower.count(axis) == 1 for axis in "zyx"):
        return [lower.index(axis) for axis in "zyx"]
    return [2, 1, 0] if x_first else [len(names) - 3, len(names) - 2, len(names) - 1]


def _names(names: Sequence[str]) -> tuple[str, str, str]:
    z, y, x = names
    return z, y, x
