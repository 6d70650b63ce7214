"""Neuroglancer's state (the JSON that describes a view) for volumes with known positions, in which they coincide."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from pipeline.viewer.data_source import Native, Triple

PUBLIC = "https://neuroglancer-demo.appspot.com/"

_GREY = "#uicontrol invlerp contrast\nvoid main() {\n  emitGrayscale(contrast());\n}\n"
_INVERTED = "#uicontrol invlerp contrast\nvoid main() {\n  emitGrayscale(1.0 - contrast());\n}\n"
_HEAT = "#uicontrol invlerp contrast\nvoid main() {\n  emitRGB(colormapJet(contrast()));\n}\n"

_PIXELS = 600.0
"""Screen pixels that the whole volume fits into, so that a small window shows all of it."""

_TOLERANCE = 1e-3
"""In voxels: far below anything visible, far above rounding errors of decimal metadata."""


@dataclass(frozen=True)
class Layer:
    """One image layer: its data source with the position that Neuroglancer would give it, and its true position.

    `url` is the folder that `native.path` starts from. `voxel_nm` is the true voxel size of native's level and
    `corner_nm` the true lower corner of that level's first voxel, both (z, y, x). `contrast` is the range of stored
    values shown from black to white (`inverted`: from white to black), None for the type's whole range. `heat` shows
    values as colours, half transparent.
    """

    name: str
    url: str
    native: Native
    voxel_nm: Triple
    corner_nm: Triple
    contrast: tuple[int | float, int | float] | None = None
    inverted: bool = False
    heat: bool = False
    visible: bool = True

    @property
    def source_url(self) -> str:
        """The URL of the data source in the spelling that Neuroglancer reads since 2023."""
        path = f"/{quote(self.native.path)}" if self.native.path else ""
        return f"{self.native.kind}://{self.url}{path}"


@dataclass(frozen=True)
class Mark:
    """An annotated box: its lower and upper corner in nm (z, y, x), and a description."""

    name: str
    low_nm: Triple
    high_nm: Triple
    description: str


def coincides(layer: Layer) -> bool:
    """Whether the volume's own metadata make Neuroglancer show the layer at its true position, with axes z, y, x."""
    voxel, corner = layer.native.level_voxel_nm, layer.native.corner_nm
    if layer.native.names != ("z", "y", "x") or voxel is None or corner is None:
        return False
    size = all(
        abs(n - t) * c <= _TOLERANCE * t for n, t, c in zip(voxel, layer.voxel_nm, layer.native.shape, strict=True)
    )
    return size and all(
        abs(n - t) <= _TOLERANCE * v for n, t, v in zip(corner, layer.corner_nm, layer.voxel_nm, strict=True)
    )


def transform(layer: Layer) -> dict[str, Any]:
    """Neuroglancer's transform from the layer's native axes to true z, y, x.

    The matrix is a translation in voxels of the finest level; the voxel sizes are in the dimensions.
    """
    native = layer.native
    voxel = [v / s for v, s in zip(layer.voxel_nm, native.step, strict=True)]
    shift = [c / v - s for c, v, s in zip(layer.corner_nm, voxel, native.start, strict=True)]
    return {
        "inputDimensions": {name: _metres(v) for name, v in zip(native.names, voxel, strict=True)},
        "outputDimensions": {name: _metres(v) for name, v in zip("zyx", voxel, strict=True)},
        "matrix": [[float(i == j) for j in range(3)] + [shift[i]] for i in range(3)],
    }


def viewer_state(layers: Sequence[Layer], focus: Layer, title: str, quarantined: Sequence[Mark] = ()) -> dict[str, Any]:
    """Neuroglancer's state with `layers` from bottom to top and the `quarantined` boxes above them.

    The view is the xy plane, since serial sections are far coarser in z, and shows the whole middle section of `focus`,
    whose voxels are the state's units.
    """
    extent = [n * v for n, v in zip(focus.native.shape, focus.voxel_nm, strict=True)]
    unit = min(focus.voxel_nm)
    middle = [c / v + n / 2 for c, v, n in zip(focus.corner_nm, focus.voxel_nm, focus.native.shape, strict=True)]
    # On a boundary between two sections either could be drawn: take the middle of one.
    middle[0] = focus.corner_nm[0] / focus.voxel_nm[0] + focus.native.shape.z // 2 + 0.5
    return {
        "title": title,
        "dimensions": {name: _metres(v) for name, v in zip("xyz", focus.voxel_nm[::-1], strict=True)},
        "position": middle[::-1],
        "crossSectionScale": max(extent[1:]) / unit / _PIXELS,
        "projectionScale": 1.5 * max(extent) / unit,
        "layers": [_layer(layer) for layer in layers]
        + ([_annotations("quarantined", quarantined, focus.voxel_nm)] if quarantined else []),
        "selectedLayer": {"layer": focus.name, "visible": True},
        "layout": "xy",
    }


def public_link(state: dict[str, Any]) -> str:
    """A link that opens the state in the public Neuroglancer. The volumes must be readable from the user's browser."""
    return f"{PUBLIC}#!{quote(json.dumps(state, separators=(',', ':')), safe='')}"


def _layer(layer: Layer) -> dict[str, Any]:
    source: dict[str, Any] = {"url": layer.source_url}
    if not coincides(layer):
        source["transform"] = transform(layer)
    out: dict[str, Any] = {
        "type": "image",
        "name": layer.name,
        "source": source,
        "tab": "rendering",
        "opacity": 0.5 if layer.heat else 1,
        "shader": _HEAT if layer.heat else _INVERTED if layer.inverted else _GREY,
        "visible": layer.visible,
    }
    if layer.contrast:
        out["shaderControls"] = {"contrast": {"range": list(layer.contrast)}}
    return out


def _annotations(name: str, marks: Sequence[Mark], voxel_nm: Triple) -> dict[str, Any]:
    """An annotation layer of boxes, stored in the state itself, in voxels of `voxel_nm`."""

    def point(corner_nm: Triple) -> list[float]:
        return [c / v for c, v in zip(corner_nm[::-1], voxel_nm[::-1], strict=True)]

    return {
        "type": "annotation",
        "name": name,
        "source": {
            "url": "local://annotations",
            "transform": {
                "outputDimensions": {axis: _metres(v) for axis, v in zip("xyz", voxel_nm[::-1], strict=True)}
            },
        },
        "tab": "annotations",
        "annotationColor": "#ff4040",
        "annotations": [
            {
                "type": "axis_aligned_bounding_box",
                "id": m.name,
                "pointA": point(m.low_nm),
                "pointB": point(m.high_nm),
                "description": m.description,
            }
            for m in marks
        ],
    }


def _metres(nm: float) -> list[Any]:
    return [nm / 1e9, "m"]
