"""Small Zarr arrays written by hand, byte by byte, with whatever metadata other libraries write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = (4, 8, 8)
Z, Y, X = np.meshgrid(*(np.arange(n) for n in (6, 20, 26)), indexing="ij")
TRUTH = (100 + (7 * Z + 3 * Y + X) % 97).astype("u1")
"""The voxels (z, y, x); no two neighbours along an axis are the same."""
Encode = Callable[[np.ndarray], bytes]


def chunks(voxels: np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Place in the grid and voxels of each chunk, those that leave the array filled up with 7."""
    chunk = (1,) * (voxels.ndim - 3) + CHUNK
    for at in itertools.product(*(range(-(-n // c)) for n, c in zip(voxels.shape, chunk, strict=True))):
        part = voxels[tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunk, strict=True))]
        beyond = [(0, c - n) for c, n in zip(chunk, part.shape, strict=True)]
        yield at, np.pad(part, beyond, constant_values=7)


def zarr2(
    path: Path,
    voxels: np.ndarray = TRUTH,
    encode: Encode = bytes,
    names: str = ".",
    attributes: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **keys: Any,
) -> Path:
    """An array whose chunks are called with `names` between the numbers. `keys` are set in .zarray, `drop` left out."""
    metadata = {
        "zarr_format": 2,
        "shape": voxels.shape,
        "chunks": (1,) * (voxels.ndim - 3) + CHUNK,
        "dtype": voxels.dtype.str,
        "order": "C",
        "fill_value": 0,
        "compressor": None,
        "filters": None,
        "dimension_separator": ".",
    } | keys
    path.mkdir(parents=True)
    (path / ".zarray").write_text(json.dumps({key: value for key, value in metadata.items() if key not in drop}))
    if attributes is not None:
        (path / ".zattrs").write_text(json.dumps(attributes))
    for at, part in chunks(voxels):
        _write(path / names.join(map(str, at)), encode(part))
    return path


def zarr3(
    path: Path,
    voxels: np.ndarray = TRUTH,
    encode: Encode = bytes,
    names: str = "c/",
    attributes: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    **keys: Any,
) -> Path:
    """The same in Zarr v3. `names` is what stands before the numbers of a chunk and ends in what stands between."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": voxels.shape,
        "data_type": voxels.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": (1,) * (voxels.ndim - 3) + CHUNK}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
        "attributes": attributes or {},
    } | keys
    path.mkdir(parents=True)
    (path / "zarr.json").write_text(json.dumps({key: value for key, value in metadata.items() if key not in drop}))
    for at, part in chunks(voxels):
        prefix = names[:-1] if len(names) == 1 else names
        _write(path / (prefix + names[-1].join(map(str, at))), encode(part))
    return path


def group2(path: Path, attributes: dict[str, Any]) -> Path:
    _write(path / ".zgroup", b'{"zarr_format": 2}')
    _write(path / ".zattrs", json.dumps(attributes).encode())
    return path


def group3(path: Path, attributes: dict[str, Any], **keys: Any) -> Path:
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": attributes} | keys
    _write(path / "zarr.json", json.dumps(metadata).encode())
    return path


def ome(path: str = "0", axes: str = "zyx", unit: str | None = "nanometer", **keys: Any) -> dict[str, Any]:
    """A multiscales entry of one level of 40 x 8 x 4 (z, y, x); `keys` are set in it."""
    named = [{"name": name, "type": "space"} | ({"unit": unit} if unit and name in "zyx" else {}) for name in axes]
    sizes = dict(zip("zyx", (40.0, 8.0, 4.0), strict=True))
    scale = {"type": "scale", "scale": [sizes.get(name, 1.0) for name in axes]}
    return {"axes": named, "datasets": [{"path": path, "coordinateTransformations": [scale]}], "version": "0.4"} | keys


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
