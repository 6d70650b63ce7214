"""Volumes in every format that sources read are written here by other people's writers, never by the project's own.

These are zarr-python, cloud-volume and tensorstore.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import tensorstore as ts
import zarr
import zarr.codecs

SHAPE = (20, 40, 50)
CHUNK = (8, 16, 16)
SHARD = (16, 32, 32)
VOXEL_NM = (40.0, 8.0, 4.0)
OFFSET = (7, -6, 500)
"""The precomputed volumes' first voxel lies there (z, y, x); one number is negative."""


def truth(shape: Sequence[int] = SHAPE, dtype: str = "uint8") -> np.ndarray:
    """The voxels are smooth enough for jpeg, never zero, and differ along every axis."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    grey = 120 + 50 * np.sin(z / 3 + y / 9) * np.cos(x / 8 - z / 5) + (z + 2 * y + 3 * x) % 5
    return (grey * (200 if dtype == "uint16" else 1)).astype(dtype)


@dataclass(frozen=True)
class Written:
    """This is a volume as written. `chunk` is the file of its first chunk or shard; `tolerance` is in grey levels."""

    path: Path
    voxels: np.ndarray
    start: tuple[int, int, int]
    chunk: str
    metadata: tuple[str, ...]
    format: str
    tolerance: int = 0
    array: str | None = None
    has_voxel_size: bool = True


def _zarr_array(
    path: Path, voxels: np.ndarray, version: int, compressor: Any, shards: tuple[int, ...] | None = None, **more: Any
) -> zarr.Array:
    lead = voxels.ndim - 3
    array = zarr.create_array(
        path,
        shape=voxels.shape,
        chunks=(1,) * lead + CHUNK,
        shards=None if shards is None else (1,) * lead + shards,
        dtype=voxels.dtype,
        zarr_format=version,
        compressors=compressor,
        fill_value=0,
        config={"write_empty_chunks": True},
        **more,
    )
    array[...] = voxels
    return array


def zarr2(
    path: Path, compressor: Any = None, separator: str = ".", order: str = "C", voxels: np.ndarray | None = None
) -> Written:
    voxels = truth() if voxels is None else voxels
    _zarr_array(path, voxels, 2, compressor, chunk_key_encoding={"name": "v2", "separator": separator}, order=order)
    return Written(
        path, voxels, (0, 0, 0), separator.join(["0"] * voxels.ndim), (".zarray",), "zarr2", has_voxel_size=False
    )


def zarr3(
    path: Path, compressor: Any = None, sharded: bool = False, voxels: np.ndarray | None = None, **more: Any
) -> Written:
    voxels = truth() if voxels is None else voxels
    _zarr_array(path, voxels, 3, compressor, SHARD if sharded else None, **more)
    return Written(path, voxels, (0, 0, 0), "c" + "/0" * voxels.ndim, ("zarr.json",), "zarr3", has_voxel_size=False)


def halved(voxels: np.ndarray) -> np.ndarray:
    """The result has every second voxel in y and x and stands in for a pyramid's next level."""
    return np.ascontiguousarray(voxels[..., ::2, ::2])


def ome_metadata(
    names: str = "zyx", levels: int = 2, unit: str | None = "nanometer", per_nm: float = 1.0
) -> dict[str, Any]:
    """The result is one multiscales entry; level k is laterally 2^k coarser and lies where averaging would put it."""
    kinds = {"t": "time", "c": "channel"}
    axes = [{"name": n, "type": kinds.get(n, "space")} | ({"unit": unit} if unit and n in "zyx" else {}) for n in names]
    datasets = []
    for level in range(levels):
        factor = {"z": 1, "y": 2**level, "x": 2**level}
        sizes = dict(zip("zyx", VOXEL_NM, strict=True))
        scale = [sizes[n] * factor[n] * per_nm if n in "zyx" else 1.0 for n in names]
        moved = [sizes[n] * (factor[n] - 1) / 2 * per_nm if n in "zyx" else 0.0 for n in names]
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": moved}]
        datasets.append({"path": f"s{level}", "coordinateTransformations": transforms})
    return {"name": "em", "axes": axes, "datasets": datasets}


def ome(path: Path, version: str, names: str = "zyx", unit: str | None = "nanometer", per_nm: float = 1.0) -> Written:
    """This writes an OME-Zarr group of two levels; `names` may permute z, y, x and lead with t and c of length 1."""
    voxels = truth()
    zarr_format = 2 if version == "0.4" else 3
    entry = ome_metadata(names, unit=unit, per_nm=per_nm)
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    if version == "0.4":
        group.attrs["multiscales"] = [entry | {"version": "0.4"}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": [entry]}
    for level, data in enumerate((voxels, halved(voxels))):
        stored = data.transpose(["zyx".index(n) for n in names if n in "zyx"])
        stored = stored.reshape((1,) * (len(names) - 3) + stored.shape)
        more: dict[str, Any] = (
            {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
            if zarr_format == 2
            else {"dimension_names": list(names)}
        )
        compressor = numcodecs.Zstd() if zarr_format == 2 else zarr.codecs.ZstdCodec()
        _zarr_array(path / f"s{level}", stored, zarr_format, compressor, **more)
    zeros = "/0" * len(names)
    documents = ("zarr.json", "s0/zarr.json") if zarr_format == 3 else (".zattrs", "s0/.zarray")
    return Written(
        path, voxels, (0, 0, 0), "s0" + ("/c" if zarr_format == 3 else "") + zeros, documents, f"zarr{zarr_format}"
    )


def _n5_array(path: Path, voxels: np.ndarray, compression: dict[str, Any], **attributes: Any) -> None:
    spec = {
        "driver": "n5",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "dimensions": voxels.shape[::-1],
            "blockSize": CHUNK[::-1],
            "dataType": str(voxels.dtype),
            "compression": compression,
        },
        "create": True,
        "store_data_equal_to_fill_value": True,
    }
    ts.open(spec).result().write(voxels.T).result()
    document = path / "attributes.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | attributes))


def n5(path: Path, compression: str = "gzip", voxels: np.ndarray | None = None) -> Written:
    voxels = truth() if voxels is None else voxels
    extra = {"blosc": {"cname": "zstd", "clevel": 1, "shuffle": 1}}.get(compression, {})
    _n5_array(path, voxels, {"type": compression} | extra, pixelResolution={"dimensions": VOXEL_NM[::-1], "unit": "nm"})
    return Written(path, voxels, (0, 0, 0), "0/0/0", ("attributes.json",), "n5")


def n5_group(path: Path) -> Written:
    """This writes s0 and s1 below a group that holds the resolution, as paintera has it."""
    voxels = truth()
    for level, data in enumerate((voxels, halved(voxels))):
        factors = {"downsamplingFactors": [2**level, 2**level, 1]} if level else {}
        _n5_array(path / f"s{level}", data, {"type": "gzip"}, **factors)
    (path / "attributes.json").write_text(json.dumps({"n5": "2.5.0", "multiScale": True, "resolution": VOXEL_NM[::-1]}))
    return Written(path, voxels, (0, 0, 0), "s0/0/0/0", ("attributes.json", "s0/attributes.json"), "n5")


def precomputed(
    path: Path,
    encoding: str = "raw",
    sharded: bool = False,
    data_encoding: str = "gzip",
    voxels: np.ndarray | None = None,
) -> Written:
    """tensorstore writes this: files without a suffix, or shards."""
    voxels = truth() if voxels is None else voxels
    scale: dict[str, Any] = {
        "key": "4_8_40",
        "size": voxels.shape[::-1],
        "voxel_offset": OFFSET[::-1],
        "chunk_size": CHUNK[::-1],
        "resolution": VOXEL_NM[::-1],
        "encoding": encoding,
    }
    if encoding == "jpeg":
        scale["jpeg_quality"] = 95
    if sharded:
        scale["sharding"] = {
            "@type": "neuroglancer_uint64_sharded_v1",
            "preshift_bits": 2,
            "minishard_bits": 1,
            "shard_bits": 2,
            "hash": "identity",
            "data_encoding": data_encoding,
            "minishard_index_encoding": data_encoding,
        }
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "multiscale_metadata": {"type": "image", "data_type": str(voxels.dtype), "num_channels": 1},
        "scale_metadata": scale,
        "create": True,
        "store_data_equal_to_fill_value": True,
    }
    ts.open(spec).result().write(voxels.T[..., None]).result()
    name = "0.shard" if sharded else chunk_name(voxels.shape)
    return Written(
        path, voxels, OFFSET, f"4_8_40/{name}", ("info",), "precomputed", tolerance=6 if encoding == "jpeg" else 0
    )


def chunk_name(shape: Sequence[int]) -> str:
    """The result is the precomputed name of the first chunk."""
    ends = [o + min(c, n) for o, c, n in zip(OFFSET, CHUNK, shape, strict=True)]
    return "_".join(f"{o}-{e}" for o, e in zip(OFFSET[::-1], ends[::-1], strict=True))


def by_cloud_volume(path: Path, encoding: str = "raw", compress: str | bool | None = "gzip", mips: int = 1) -> Written:
    """cloud-volume writes this; it compresses local files and gives them a suffix unless `compress` is False."""
    from cloudvolume import CloudVolume

    voxels = truth()
    info = CloudVolume.create_new_info(
        1, "image", "uint8", encoding, VOXEL_NM[::-1], OFFSET[::-1], SHAPE[::-1], chunk_size=CHUNK[::-1]
    )
    if encoding == "jxl":
        info["scales"][0]["jxl_quality"] = 100
    volume = CloudVolume(f"file://{path}", info=info, compress=compress, progress=False)
    for level in range(1, mips):
        volume.add_scale((2**level, 2**level, 1))
    volume.commit_info()
    volume[:, :, :] = voxels.T[..., None]
    if mips > 1:
        coarse = CloudVolume(f"file://{path}", mip=1, compress=compress, progress=False)
        coarse[:, :, :] = halved(voxels).T[..., None]
    suffix = {"gzip": ".gz", "br": ".br", "zstd": ".zstd"}.get(str(compress), "")
    key = volume.scales[0]["key"]
    return Written(
        path,
        voxels,
        OFFSET,
        f"{key}/{chunk_name(SHAPE)}{suffix}",
        ("info",),
        "precomputed",
        tolerance=10 if encoding == "jpeg" else 0,
    )


def sharded_jpeg_xl(path: Path) -> Written:
    """cloud-volume writes this too: chunks that it encodes, packed by its own shards."""
    from cloudvolume.chunks import encode
    from cloudvolume.datasource.precomputed.common import compressed_morton_code
    from cloudvolume.datasource.precomputed.sharding import ShardingSpecification

    volume = precomputed(path, sharded=True)
    info = json.loads((path / "info").read_text())
    info["scales"][0] |= {"encoding": "jxl", "jxl_quality": 100}
    (path / "info").write_text(json.dumps(info))
    grid = [-(-n // c) for n, c in zip(SHAPE, CHUNK, strict=True)]
    chunks = {}
    for at in np.ndindex(*grid):
        part = tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, CHUNK, strict=True))
        voxels = np.asfortranarray(volume.voxels[part].T[..., None])
        number = int(compressed_morton_code(np.array(at[::-1]), np.array(grid[::-1])))
        chunks[number] = encode(voxels, "jxl", compression_params={"level": 100, "jxl_effort": 3})
    for file in (path / "4_8_40").iterdir():
        file.unlink()
    shards = ShardingSpecification.from_dict(info["scales"][0]["sharding"]).synthesize_shards(chunks, progress=False)
    for name, data in shards.items():
        (path / "4_8_40" / name).write_bytes(data)
    return volume


_BLOSC = numcodecs.Blosc("zstd", 1, numcodecs.Blosc.BITSHUFFLE)

FORMATS: dict[str, Callable[[Path], Written]] = {
    "zarr2-raw": lambda p: zarr2(p),
    "zarr2-blosc": lambda p: zarr2(p, _BLOSC, "/"),
    "zarr2-zstd-fortran": lambda p: zarr2(p, numcodecs.Zstd(), order="F"),
    "zarr2-gzip": lambda p: zarr2(p, numcodecs.GZip()),
    "zarr2-zlib": lambda p: zarr2(p, numcodecs.Zlib()),
    "zarr2-bz2": lambda p: zarr2(p, numcodecs.BZ2()),
    "zarr3-raw": lambda p: zarr3(p),
    "zarr3-gzip": lambda p: zarr3(p, zarr.codecs.GzipCodec()),
    "zarr3-zstd": lambda p: zarr3(p, zarr.codecs.ZstdCodec()),
    "zarr3-blosc": lambda p: zarr3(p, zarr.codecs.BloscCodec(cname="zstd")),
    "zarr3-sharded-raw": lambda p: zarr3(p, sharded=True),
    "zarr3-sharded-blosc": lambda p: zarr3(p, zarr.codecs.BloscCodec(cname="zstd"), sharded=True),
    "ome-0.4": lambda p: ome(p, "0.4"),
    "ome-0.4-tczyx": lambda p: ome(p, "0.4", "tczyx"),
    "ome-0.5": lambda p: ome(p, "0.5"),
    "ome-0.5-cxyz": lambda p: ome(p, "0.5", "cxyz"),
    "n5-raw": lambda p: n5(p, "raw"),
    "n5-gzip": lambda p: n5(p, "gzip"),
    "n5-blosc": lambda p: n5(p, "blosc"),
    "n5-zstd": lambda p: n5(p, "zstd"),
    "n5-xz": lambda p: n5(p, "xz"),
    "n5-bzip2": lambda p: n5(p, "bzip2"),
    "n5-group": n5_group,
    "precomputed-raw": lambda p: precomputed(p),
    "precomputed-jpeg": lambda p: precomputed(p, "jpeg"),
    "precomputed-png": lambda p: precomputed(p, "png"),
    "precomputed-sharded-raw": lambda p: precomputed(p, sharded=True),
    "precomputed-sharded-plain": lambda p: precomputed(p, sharded=True, data_encoding="raw"),
    "precomputed-sharded-jpeg": lambda p: precomputed(p, "jpeg", sharded=True),
    "precomputed-sharded-png": lambda p: precomputed(p, "png", sharded=True),
    "cloud-volume-plain": lambda p: by_cloud_volume(p, "raw", False),
    "cloud-volume-raw-gz": lambda p: by_cloud_volume(p, "raw", "gzip"),
    "cloud-volume-raw-br": lambda p: by_cloud_volume(p, "raw", "br"),
    "cloud-volume-raw-zstd": lambda p: by_cloud_volume(p, "raw", "zstd"),
    "cloud-volume-jpeg-gz": lambda p: by_cloud_volume(p, "jpeg", "gzip"),
    "cloud-volume-png-gz": lambda p: by_cloud_volume(p, "png", "gzip"),
    "cloud-volume-jxl": lambda p: by_cloud_volume(p, "jxl", False),
    "cloud-volume-jxl-gz": lambda p: by_cloud_volume(p, "jxl", "gzip"),
    "cloud-volume-sharded-jxl": sharded_jpeg_xl,
}
"""Sources promise every format and codec here."""
