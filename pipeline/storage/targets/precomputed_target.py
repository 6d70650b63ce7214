"""Neuroglancer precomputed targets: info, provenance, and where each level's chunks or shards lie.

Below the target's url, where x comes first in every list and name:

    info, provenance          the pyramid; emsr's provenance in cloud-volume's form
    4_4_40/0-64_0-64_0-8      a chunk of the scale of 4 x 4 x 40 nm, named by its voxels; or
    4_4_40/1f.shard           a shard of chunks
    fidelity/                 a volume like it, of one scale
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import tensorstore as ts

from pipeline.base.errors import TargetError
from pipeline.base.geometry import ZYX
from pipeline.plan.target_spec import FIDELITY, LevelSpec, TargetSpec
from pipeline.storage import jpeg_xl
from pipeline.storage import precomputed_morton as sharding
from pipeline.storage.targets.encode import StoredArray
from pipeline.storage.targets.precomputed_shard_files import ShardFiles

JPEG_QUALITY = 90
_JPEG_EDGE = 65500
"""libjpeg's limit on rows and columns; a chunk is one image of x columns and y * z rows."""

_VOLUME = {"type": "image", "data_type": "uint8", "num_channels": 1}


def arrays(spec: TargetSpec) -> dict[int, StoredArray]:
    """The stored arrays by level, FIDELITY among them. Raises TargetError where the format has no such shards or
    images.
    """
    found = {
        k: _array("", scale, level) for k, (scale, level) in enumerate(zip(_scales(spec), spec.levels, strict=True))
    }
    if spec.fidelity is not None:
        found[FIDELITY] = _array("fidelity/", _fidelity_scale(spec, spec.fidelity), spec.fidelity)
    return found


def metadata(spec: TargetSpec) -> dict[str, bytes]:
    """The metadata objects, key -> bytes, the root's info last. The same spec gives the same bytes."""
    objects = {}
    if spec.fidelity is not None:
        objects["fidelity/info"] = _json(_info([_fidelity_scale(spec, spec.fidelity)]))
    objects["provenance"] = _json(
        {"description": "", "owners": [], "processing": [{"method": spec.provenance, "by": ""}], "sources": []}
    )
    return objects | {"info": _json(_info(_scales(spec)))}


PROVENANCE = "provenance"
"""The metadata object that holds emsr's provenance."""


def provenance(value: bytes) -> dict[str, Any] | None:
    """emsr's provenance, as PROVENANCE holds it; None where `value` holds none."""
    try:
        found = json.loads(value)["processing"][0]["method"]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return found if isinstance(found, dict) and "emsr" in found else None


def is_foreign(spec: TargetSpec, objects: Mapping[str, bytes]) -> bool:
    """Whether these metadata, none of which is this target's or almost so, are those of another volume."""
    theirs = provenance(objects.get(PROVENANCE, b""))
    if theirs is not None and theirs.get("digest") != spec.provenance.get("digest"):
        return True
    try:
        keys = {scale["key"] for scale in json.loads(objects["info"])["scales"]}
    except (ValueError, KeyError, TypeError):
        return False  # damaged, or absent
    return bool(keys) and keys.isdisjoint(scale["key"] for scale in _scales(spec))


def voxel_offset(corner_nm: tuple[float, float, float], voxel_size_nm: tuple[float, float, float], level: int) -> ZYX:
    """The voxel_offset (z, y, x) of mip `level`, in its own whole voxels, of a volume whose lower corner is at
    `corner_nm`.

    Mip 0: corner / voxel size, rounded half up. Laterally that is exact, because a corner is a multiple of half an LR
    voxel and LR voxels are 8 or 16 SR voxels; in z an OME source's corner is half a section before its first section,
    and rounding up puts section k at z = k.

    Coarser mips: floor(mip 0's / 2^level) in y and x. Where 2^level does not divide mip 0's offset, the level lies up
    to one of its own voxels too low, because the format has whole voxels only.
    """
    # Rounded to 1e-6 of a voxel first: the ratio of two decimals must not fall below its half by the last bit.
    z, y, x = (math.floor(round(corner / size, 6) + 0.5) for corner, size in zip(corner_nm, voxel_size_nm, strict=True))
    return ZYX(z, y // 2**level, x // 2**level)


def _info(scales: list[dict[str, Any]]) -> dict[str, Any]:
    stored = [
        {k: v for k, v in scale.items() if k != "chunk_size"} | {"chunk_sizes": [scale["chunk_size"]]}
        for scale in scales
    ]
    return {"@type": "neuroglancer_multiscale_volume", **_VOLUME, "scales": stored}


def _scales(spec: TargetSpec) -> list[dict[str, Any]]:
    z, y, x = spec.voxel_size_nm
    scales = []
    for k, level in enumerate(spec.levels):
        offset = voxel_offset(spec.corner_nm, spec.voxel_size_nm, k)
        scales.append(_scale(level, (z, y * 2**k, x * 2**k), offset, spec.encoding))
    return scales


def _fidelity_scale(spec: TargetSpec, level: LevelSpec) -> dict[str, Any]:
    """The fidelity volume's scale, of LR voxel size. It is never jpeg, whose losses would change its values."""
    z, y, x = spec.voxel_size_nm
    size = (z, y * spec.scale, x * spec.scale)
    return _scale(
        level, size, voxel_offset(spec.corner_nm, size, 0), "raw" if spec.encoding == "jpeg" else spec.encoding
    )


def _scale(level: LevelSpec, voxel_size_nm: tuple[float, float, float], offset: ZYX, encoding: str) -> dict[str, Any]:
    """One scale in tensorstore's spelling (chunk_size where the file has chunk_sizes)."""
    resolution = [int(v) if float(v).is_integer() else float(v) for v in reversed(voxel_size_nm)]
    scale: dict[str, Any] = {
        "key": "_".join(f"{v:.12g}" for v in resolution),
        "resolution": resolution,
        "size": _xyz(level.shape),
        "voxel_offset": _xyz(offset),
        "chunk_size": _xyz(level.chunk),
        "encoding": encoding,
    }
    if encoding == "jxl" and not _fits_jpeg_xl(level.chunk):
        raise TargetError(
            f"chunk_shape {level.chunk} is too large for jxl",
            f"x, and z times y, up to {jpeg_xl.MAX_EDGE}, and {jpeg_xl.MAX_PIXELS} voxels",
            "Use smaller chunks",
        )
    if encoding == "jpeg":
        if max(level.chunk.x, level.chunk.y * level.chunk.z) > _JPEG_EDGE:
            raise TargetError(
                f"chunk_shape {level.chunk} is too large for jpeg",
                f"x, and z times y, up to {_JPEG_EDGE}",
                "Use smaller chunks",
            )
        scale["jpeg_quality"] = JPEG_QUALITY
    if level.shard != level.chunk:
        scale["sharding"] = _sharding(level)
    return scale


def _fits_jpeg_xl(chunk: ZYX) -> bool:
    return max(chunk.x, chunk.y * chunk.z) <= jpeg_xl.MAX_EDGE and chunk.product <= jpeg_xl.MAX_PIXELS


def _sharding(level: LevelSpec) -> dict[str, Any]:
    grid = level.shape.ceil_div(level.chunk)
    if any(level.shard % level.chunk) or level.shard // level.chunk not in sharding.shard_shapes(grid):
        nearest = sharding.nearest_shape(grid, level.shard.maximum(level.chunk) // level.chunk) * level.chunk
        raise TargetError(
            f"shard_shape {level.shard} is none that sharded precomputed has for an array of {level.shape} "
            f"in chunks of {level.chunk}",
            f"the nearest is {nearest}",
            "Use that, or chunk_shape itself for a volume without shards",
        )
    preshift, minishard, shard = sharding.bits_for(grid, level.shard // level.chunk)
    return {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": "identity",
        "preshift_bits": preshift,
        "minishard_bits": minishard,
        "shard_bits": shard,
        "minishard_index_encoding": "gzip",
        "data_encoding": "raw",
    }


def _array(folder: str, scale: dict[str, Any], level: LevelSpec) -> StoredArray:
    driver = {"driver": "neuroglancer_precomputed"}
    stored = driver | {"scale_metadata": {"key": scale["key"]}}
    chunks = {name: value for name, value in scale.items() if name != "sharding"}
    known = driver | {"multiscale_metadata": _VOLUME, "scale_metadata": chunks}
    x, y, z = scale["voxel_offset"]
    scale_folder = f"{folder}{scale['key']}/"
    chunk_key = partial(_chunk_key, scale_folder, level, ZYX(z, y, x))
    chunk_position = partial(_chunk_position, scale_folder, level, ZYX(z, y, x))
    image = scale["key"] if scale["encoding"] == "jxl" else None
    if "sharding" not in scale:
        return StoredArray(level, folder, stored, known, _as_zyx, chunk_key, chunk_position, jpeg_xl=image)
    files = ShardFiles(level, scale_folder, scale["sharding"], chunk_key)
    key, position = partial(_shard_key, scale_folder, level), partial(_shard_position, scale_folder, level)
    return StoredArray(level, folder, stored, known, _as_zyx, key, position, shard_files=files, jpeg_xl=image)


def _as_zyx(array: ts.TensorStore) -> ts.TensorStore:
    """(x, y, z, channel) from voxel_offset -> (z, y, x) from (0, 0, 0)."""
    return array[..., 0].T[ts.d[:].translate_to[0]]


def _chunk_key(prefix: str, level: LevelSpec, offset: ZYX, position: ZYX) -> str:
    start = position * level.chunk
    stop = (start + level.chunk).minimum(level.shape) + offset
    return prefix + "_".join(f"{a}-{b}" for a, b in zip(_xyz(start + offset), _xyz(stop), strict=True))


def _shard_key(prefix: str, level: LevelSpec, position: ZYX) -> str:
    in_chunks = level.shard // level.chunk
    return prefix + sharding.shard_name(level.shape.ceil_div(level.chunk), in_chunks, position * in_chunks)


def _chunk_position(prefix: str, level: LevelSpec, offset: ZYX, key: str) -> ZYX | None:
    span = r"(-?\d+)-(-?\d+)"
    found = re.fullmatch(re.escape(prefix) + "_".join([span] * 3), key)
    return (ZYX(*(int(found[i]) for i in (5, 3, 1))) - offset) // level.chunk if found else None


def _shard_position(prefix: str, level: LevelSpec, key: str) -> ZYX | None:
    found = re.fullmatch(re.escape(prefix) + r"([0-9a-f]+)\.shard", key)
    if found is None:
        return None
    in_chunks = level.shard // level.chunk
    return sharding.first_chunk(level.shape.ceil_div(level.chunk), in_chunks, int(found[1], 16)) // in_chunks


def _xyz(values: ZYX) -> list[int]:
    return [values.x, values.y, values.z]


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
