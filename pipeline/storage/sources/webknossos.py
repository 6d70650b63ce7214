"""What WEBKNOSSOS' datasource-properties.json says of a layer's array: in it x comes before y and z."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from pipeline.base.errors import SourceError
from pipeline.storage.sources.axes import nm_per
from pipeline.storage.sources.metadata import Folder
from pipeline.storage.sources.zarr_attributes import Place

_FILE = "datasource-properties.json"
_AXES = ("c", "x", "y", "z")


def look(folder: Folder, path: str, rank: int) -> tuple[list[str | None], Place] | None:
    """Names of the axes and the place of the array at `path`, DATASET/LAYER/MAG; None where no dataset names it."""
    root, _, tail = f"{folder.url}/{path}".rstrip("/").rpartition("/")
    root, _, layer = root.rpartition("/")
    if rank not in (3, 4) or not root.partition("://")[2].strip("/"):
        return None
    try:
        found = Folder(root).metadata(_FILE)
    except SourceError:
        return None
    layers = found.values.get("dataLayers") if found is not None else None
    stated = next((one for one in _objects(layers) if one.get("name") == unquote(layer)), None)
    if found is None or stated is None:
        return None
    mags = [one for one in _objects(stated.get("mags")) if _ends(one, unquote(tail))]
    factors = _mag(mags[0].get("mag")) if mags else _mag(unquote(tail))
    order = mags[0].get("axisOrder") if mags else None
    names: list[str | None] = [*_AXES[-rank:]]
    if isinstance(order, dict):
        names = [next((name for name, axis in order.items() if axis == at), None) for at in range(rank)]
    scale = found.values.get("scale")
    sizes = _three(scale.get("factor") if isinstance(scale, dict) else scale)
    factor = nm_per(scale.get("unit") if isinstance(scale, dict) else "nm")
    if factor is None or factors is None or sizes is None:
        return names, Place()
    x, y, z = (size * factor * step for size, step in zip(sizes, factors, strict=True))
    return names, Place(size_nm=(z, y, x), corner_voxels=(0.0, 0.0, 0.0))


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _ends(mag: dict[str, Any], name: str) -> bool:
    path = mag.get("path")
    stated = path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else None
    return name == stated or (stated is None and _mag(mag.get("mag")) == _mag(name))


def _mag(value: Any) -> tuple[float, float, float] | None:
    """The steps (x, y, z) of a magnification: [2, 2, 1], "2-2-1", 2 or "2"."""
    if isinstance(value, str) and all(part.isdecimal() for part in value.split("-")):
        value = [int(part) for part in value.split("-")]
    if isinstance(value, int) or (isinstance(value, list) and len(value) == 1):
        value = [value[0] if isinstance(value, list) else value] * 3
    return _three(value)


def _three(value: Any) -> tuple[float, float, float] | None:
    if not isinstance(value, list) or len(value) != 3 or not all(map(_size, value)):
        return None
    return value[0], value[1], value[2]


def _size(value: object) -> bool:
    return isinstance(value, (int, float)) and 1e-9 < value < 1e15
