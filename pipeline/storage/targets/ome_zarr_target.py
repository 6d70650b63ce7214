"""OME-Zarr 0.5 targets: the metadata objects, and where each level's shards lie.

Below the target's url:

    zarr.json            group: the pyramid, and emsr's provenance
    0/zarr.json  0/c/... mip 0; 1/, 2/, ... the coarser mips
    fidelity/            a group like it, of one level
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import tensorstore as ts

from pipeline.base.errors import TargetError
from pipeline.base.geometry import ZYX
from pipeline.plan.target_spec import FIDELITY, LevelSpec, TargetSpec
from pipeline.storage.targets.encode import StoredArray
from pipeline.storage.targets.zarr_shard_files import ZarrShards

_CODECS: dict[str, list[dict[str, Any]]] = {
    "raw": [],
    "zstd": [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}],
    "blosc-zstd": [
        {
            "name": "blosc",
            "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle", "typesize": 1, "blocksize": 0},
        }
    ],
}


def arrays(spec: TargetSpec) -> dict[int, StoredArray]:
    """The stored arrays by level, FIDELITY among them. Raises TargetError where a shard is not whole chunks."""
    found = {k: _array(f"{k}/", level, spec.encoding) for k, level in enumerate(spec.levels)}
    if spec.fidelity is not None:
        found[FIDELITY] = _array("fidelity/0/", spec.fidelity, spec.encoding)
    return found


def metadata(spec: TargetSpec) -> dict[str, bytes]:
    """The metadata objects, key -> bytes, the root's last. The same spec gives the same bytes."""
    objects = {f"{array.folder}zarr.json": _json(array.known["metadata"]) for array in arrays(spec).values()}
    if spec.fidelity is not None:
        z, y, x = spec.voxel_size_nm
        group = _group("fidelity", 1, (z, y * spec.scale, x * spec.scale), spec.corner_nm)
        objects["fidelity/zarr.json"] = _json(group)
    root = _group(spec.name, len(spec.levels), spec.voxel_size_nm, spec.corner_nm)
    root["attributes"]["emsr"] = spec.provenance
    return objects | {"zarr.json": _json(root)}


PROVENANCE = "zarr.json"
"""The metadata object that holds emsr's provenance."""


def provenance(value: bytes) -> dict[str, Any] | None:
    """emsr's provenance, as PROVENANCE holds it; None where `value` holds none."""
    try:
        found = json.loads(value)["attributes"]["emsr"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def name(value: bytes) -> str | None:
    """What PROVENANCE calls the volume; None where it says nothing."""
    try:
        found = json.loads(value)["attributes"]["ome"]["multiscales"][0]["name"]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return found if isinstance(found, str) else None


def is_foreign(spec: TargetSpec, objects: Mapping[str, bytes]) -> bool:
    """Whether these metadata, none of which is this target's or almost so, are those of another volume."""
    try:
        root = json.loads(objects["zarr.json"])
        theirs = provenance(objects["zarr.json"])
        if theirs is not None:
            return bool(theirs.get("digest") != spec.provenance.get("digest"))
        return bool(root["node_type"] == "array" or "ome" in root["attributes"])
    except (ValueError, KeyError, TypeError):
        return False  # damaged, or absent


def _group(
    name: str, levels: int, voxel_size_nm: tuple[float, float, float], corner_nm: tuple[float, float, float]
) -> dict[str, Any]:
    """The metadata of a group. NGFF's translation is the centre of a level's first voxel: corner + half a voxel.

    The levels share the corner, as each is made of 2 x 2 means of the one before, not the centre.
    """
    datasets = []
    for k in range(levels):
        z, y, x = voxel_size_nm
        size = (z, y * 2**k, x * 2**k)
        centre = [corner + s / 2 for corner, s in zip(corner_nm, size, strict=True)]
        steps = [{"type": "scale", "scale": [float(s) for s in size]}, {"type": "translation", "translation": centre}]
        datasets.append({"path": str(k), "coordinateTransformations": steps})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    multiscale = {"name": name, "axes": axes, "datasets": datasets, "type": "lateral 2x2 mean"}
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"ome": {"version": "0.5", "multiscales": [multiscale]}},
    }


def _array(folder: str, level: LevelSpec, encoding: str) -> StoredArray:
    if any(level.shard % level.chunk):
        raise TargetError(
            f"shard_shape {level.shard} is not a multiple of chunk_shape {level.chunk}",
            "whole chunks on every axis in each shard",
        )
    inner = [{"name": "bytes"}, *_CODECS[encoding]]
    index: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": list(level.chunk), "codecs": inner, "index_codecs": index, "index_location": "end"}
    meta = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(level.shape),
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(level.shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": inner if level.shard == level.chunk else [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["z", "y", "x"],
        "attributes": {},
    }
    driver = {"driver": "zarr3"}
    key, position = partial(_key, folder), partial(_position, folder)
    shards = None
    if level.shard != level.chunk:
        grid = {"name": "regular", "configuration": {"chunk_shape": list(level.chunk)}}
        shards = ZarrShards(level, meta | {"chunk_grid": grid, "codecs": inner}, index, key)
    return StoredArray(
        level, folder, driver, driver | {"metadata": meta}, _as_stored, key, position, zarr_shards=shards
    )


def _as_stored(array: ts.TensorStore) -> ts.TensorStore:
    return array


def _key(folder: str, position: ZYX) -> str:
    return f"{folder}c/{position.z}/{position.y}/{position.x}"


def _position(folder: str, key: str) -> ZYX | None:
    found = re.fullmatch(re.escape(folder) + r"c/(\d+)/(\d+)/(\d+)", key)
    return ZYX(*map(int, found.groups())) if found else None


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
