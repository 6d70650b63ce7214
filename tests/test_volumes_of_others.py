"""Volumes as other writers make them: right voxels, size and place, or a refusal whose advice gives them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hand_zarr as hand
import numpy as np
import pytest
import tensorstore as ts
import tifffile
import zarr
from cloudvolume import CloudVolume
from hand_zarr import TRUTH
from odd_servers import serving

from pipeline.base.errors import EmsrError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import SourceConfig
from pipeline.convert import main as convert
from pipeline.storage.sources.open import open_source

NM = (40.0, 8.0, 4.0)
SIZED: dict[str, Any] = {"voxel_size_nm": NM}
CENTRED = (-20.0, -4.0, -2.0)
WIDE = TRUTH.astype("u2") * 300
HOLED = np.where(np.indices(TRUTH.shape)[0] < 4, 9, TRUTH).astype("u1")
Make = Callable[[Path], object]


def window(voxels: np.ndarray, low: int, high: int) -> np.ndarray:
    """Whole numbers from low to high as 0..255, rounded half up."""
    above = np.clip(voxels.astype("i8"), low, high) - low
    return ((above * 510 + high - low) // (2 * (high - low))).astype("u1")


@dataclass
class Case:
    """`make` writes at a path. Where `refused`, a pattern, is met, `advice` must open it: a url, `{}` standing for the
    path, and settings.
    """

    make: Make
    settings: dict[str, Any] = field(default_factory=lambda: SIZED)
    voxels: np.ndarray = field(default_factory=lambda: TRUTH)
    size: tuple[float, float, float] = NM
    corner: tuple[float, float, float] = (0, 0, 0)
    start: tuple[int, int, int] = (0, 0, 0)
    refused: str = ""
    url: str = "{}"
    advice: tuple[str, dict[str, Any]] | None = None


def by_zarr(voxels: np.ndarray = TRUTH, inside: str = "", **settings: Any) -> Make:
    """zarr-python, with its own defaults where `settings` say nothing."""

    def make(path: Path) -> None:
        chunks = (1,) * (voxels.ndim - 3) + hand.CHUNK
        given = {"chunks": chunks, "fill_value": 0, "config": {"write_empty_chunks": False}} | settings
        zarr.create_array(path / inside, shape=voxels.shape, dtype=voxels.dtype, **given)[...] = voxels

    return make


def by_tensorstore(driver: str, voxels: np.ndarray = TRUTH, **spec: Any) -> Make:
    def make(path: Path) -> None:
        stored = {"driver": driver, "kvstore": {"driver": "file", "path": f"{path}/"}, "create": True}
        ts.open(stored | spec | {"store_data_equal_to_fill_value": True}).result().write(voxels).result()

    return make


def n5(**metadata: Any) -> Make:
    known = {"dimensions": [26, 20, 6], "blockSize": [8, 8, 4], "dataType": "uint8", "compression": {"type": "gzip"}}
    return by_tensorstore("n5", TRUTH.T, metadata=known | metadata)


def precomputed(offset: tuple[int, int, int] = (500, -6, 7), **scale: Any) -> Make:
    known = {"key": "a", "size": [26, 20, 6], "chunk_size": [8, 8, 4], "resolution": [4, 8, 40], "encoding": "raw"}
    volume = {"type": "image", "data_type": "uint8", "num_channels": 1}
    return by_tensorstore(
        "neuroglancer_precomputed",
        TRUTH.T[..., None],
        multiscale_metadata=volume,
        scale_metadata=known | {"voxel_offset": offset} | scale,
    )


def by_cloud_volume(encoding: str = "raw", compress: str | bool = False, **scale: Any) -> Make:
    def make(path: Path) -> None:
        info = CloudVolume.create_new_info(
            1, "image", "uint8", encoding, (4, 8, 40), (500, 0, 7), (26, 20, 6), chunk_size=(8, 8, 4)
        )
        info["scales"][0].update(scale)
        volume = CloudVolume(f"file://{path}", info=info, compress=compress, progress=False)
        volume.commit_info()
        volume[:, :, :] = np.asfortranarray(TRUTH.T[..., None])

    return make


def ome(names: str = "zyx", version: int = 2, array: str = "0", **keys: Any) -> Make:
    """An OME-Zarr group of one level whose array zarr-python writes."""

    def make(path: Path) -> None:
        entry = hand.ome(array, names) | keys
        if version == 2:
            hand.group2(path, {"multiscales": [entry]})
        else:
            hand.group3(path, {"ome": {"version": "0.5", "multiscales": [entry]}})
        stored = TRUTH.transpose(["zyx".index(axis) for axis in names if axis in "zyx"])
        shape = [TRUTH.shape["zyx".index(axis)] if axis in "zyx" else 1 for axis in names]
        chunks = [min(8, n) for n in shape]
        by_zarr(stored.reshape(shape), array, zarr_format=version, chunks=chunks)(path)

    return make


def transformed(*transformations: dict[str, Any], **keys: Any) -> Make:
    return ome(datasets=[{"path": "0", "coordinateTransformations": list(transformations)}], **keys)


def unit(*units: str, scale: tuple[float, float, float]) -> Make:
    axes = [{"name": name, "type": "space", "unit": unit} for name, unit in zip("zyx", units, strict=True)]
    return transformed({"type": "scale", "scale": scale}, axes=axes)


def attributes(voxels: np.ndarray = TRUTH, **values: Any) -> Make:
    return lambda path: hand.zarr2(path, voxels, attributes=values)


def webknossos(path: Path) -> None:
    order = {"c": 0, "x": 1, "y": 2, "z": 3}
    mag = {"mag": [1, 1, 1], "path": "./color/1", "axisOrder": order}
    layer = {"name": "color", "category": "color", "dataFormat": "zarr3", "mags": [mag]}
    scale = {"factor": [4, 8, 40], "unit": "nanometer"}
    path.mkdir()
    (path / "datasource-properties.json").write_text(json.dumps({"scale": scale, "dataLayers": [layer]}))
    by_zarr(np.ascontiguousarray(TRUTH.T)[None], "color/1", chunks=(1, 8, 8, 4))(path)


def sections(path: Path) -> None:
    path.mkdir()
    for number, section in enumerate(TRUTH):
        tifffile.imwrite(path / f"s{number}.tif", section)


def wkw(path: Path) -> None:
    (path / "1").mkdir(parents=True)
    (path / "1" / "header.wkw").write_bytes(b"WKW\x01")


def nothing_but(name: str, content: str) -> Make:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text(content)

    return make


def both(group: Make, inside: str, make: Make) -> Make:
    def write(path: Path) -> None:
        group(path)
        make(path / inside)

    return write


NM3 = ["nm", "nm", "nm"]
ORDER_F = {"axes": ["x", "y", "z"], "scale": [4, 8, 40], "translate": [40, 80, 400], "units": NM3, "order": "F"}
SCALE = {"type": "scale", "scale": [40, 8, 4]}
LAYOUT = both(lambda path: hand.group2(path, {"bioformats2raw.layout": 3}), "0", ome("tczyx"))
PLAIN = both(lambda path: hand.group2(path, {}), "em", by_zarr(zarr_format=2))
SPARSE = {"missing_chunks": {"fill": 9}}
SHARDS = {
    "@type": "neuroglancer_uint64_sharded_v1",
    "preshift_bits": 1,
    "minishard_bits": 1,
    "shard_bits": 2,
    "hash": "murmurhash3_x86_128",
    "data_encoding": "gzip",
    "minishard_index_encoding": "raw",
}
N5_TOOLS = r"resolution is \[4, 8, 40\], which N5 tools write x first.*voxel_size_nm"

CASES: dict[str, Case] = {
    # zarr-python
    "chunks and codecs by themselves": Case(by_zarr(chunks="auto")),
    "chunks and codecs by themselves, v2": Case(by_zarr(chunks="auto", zarr_format=2)),
    "shards in a transposed order": Case(
        by_zarr(shards=(8, 16, 16), filters=[zarr.codecs.TransposeCodec(order=(2, 0, 1))])
    ),
    "big endian in shards": Case(
        by_zarr(WIDE, shards=(8, 16, 16), serializer=zarr.codecs.BytesCodec(endian="big")),
        SIZED | {"intensity_window": (0, 65535)},
        window(WIDE, 0, 65535),
    ),
    "int16 inverted": Case(
        by_zarr(TRUTH.astype("i2") - 150),
        SIZED | {"intensity_window": (-50, 40), "invert": True},
        255 - window(TRUTH.astype("i2") - 150, -50, 40),
    ),
    "dimension_names x y z": Case(by_zarr(np.ascontiguousarray(TRUTH.T), dimension_names=["x", "y", "z"])),
    "a last axis of one with a name": Case(
        by_zarr(np.ascontiguousarray(TRUTH.T)[..., None], chunks=(8, 8, 4, 1), dimension_names=["x", "y", "z", "c"])
    ),
    "a last axis of one without": Case(
        by_zarr(TRUTH[..., None], chunks=(4, 8, 8, 1)),
        refused=r"shape \[6, 20, 26, 1\]\).*dimension_names in zarr.json",
    ),
    "sparse": Case(by_zarr(HOLED, fill_value=9), voxels=HOLED, refused=r"fill: 9", advice=("{}", SIZED | SPARSE)),
    "sparse in shards": Case(
        by_zarr(HOLED, shards=(8, 16, 16), fill_value=9),
        voxels=HOLED,
        refused=r"fill: 9",
        advice=("{}", SIZED | SPARSE),
    ),
    "bool": Case(by_zarr(TRUTH > 120), refused=r"is bool.*source\.mask"),
    "times": Case(by_zarr(TRUTH.astype("M8[s]"), fill_value=np.datetime64(0, "s")), refused=r"datetime64.*Store"),
    "an array in a group": Case(PLAIN, refused=r"source\.array: em", advice=("{}", SIZED | {"array": "em"})),
    # tensorstore
    "zarr3 with labels and units": Case(
        by_tensorstore(
            "zarr3",
            TRUTH.T,
            dtype="uint8",
            schema={
                "domain": {"labels": ["x", "y", "z"], "inclusive_min": [0, 0, 0], "exclusive_max": [26, 20, 6]},
                "dimension_units": ["0.004um", "0.008 um", "40 nm"],
            },
        ),
        {},
    ),
    "n5 with units": Case(
        n5(axes=["x", "y", "z"], units=["nm", "nm", "um"], resolution=[4, 8, 0.04]),
        {},
    ),
    "precomputed before the origin": Case(precomputed(), {}, start=(7, -6, 500)),
    "precomputed shards": Case(precomputed(sharding=SHARDS), {}, start=(7, -6, 500)),
    "precomputed of fractions of nm": Case(
        precomputed(resolution=[3.58, 8.25, 40.5]), {}, size=(40.5, 8.25, 3.58), start=(7, -6, 500)
    ),
    # cloud-volume
    "by cloud-volume, files in gzip": Case(by_cloud_volume(compress="gzip"), {}, start=(7, 0, 500)),
    "by cloud-volume, png": Case(by_cloud_volume("png"), {}, start=(7, 0, 500)),
    "by cloud-volume, jxl": Case(by_cloud_volume("jxl", jxl_quality=100), {}, start=(7, 0, 500)),
    # OME-Zarr
    "ome czyx": Case(ome("czyx"), {}, corner=CENTRED),
    "ome 0.5 x y z": Case(ome("xyz", 3), {}, corner=CENTRED),
    "ome, z before t": Case(ome("ztyx"), {}, corner=CENTRED),
    "ome, arrays of v2 in a group of v3": Case(
        both(lambda path: hand.group3(path, {"ome": {"multiscales": [hand.ome()]}}), "0", by_zarr(zarr_format=2)),
        {},
        corner=CENTRED,
    ),
    "ome, a path of dots and slashes": Case(
        ome(datasets=[{"path": "./0/", "coordinateTransformations": [SCALE]}]), {}, corner=CENTRED
    ),
    "ome, units mixed and misspelt": Case(unit("Microns", " NM", "Ångström", scale=(0.04, 8, 40)), {}, corner=CENTRED),
    "ome, megametres": Case(
        unit("Mm", "Mm", "Mm", scale=(40, 8, 4)),
        {},
        corner=CENTRED,
        refused=r"units are \['Mm', 'Mm', 'Mm'\].*voxel_size_nm",
        advice=("{}", SIZED),
    ),
    "ome, translation before scale": Case(
        transformed({"type": "translation", "translation": [10, 12.5, 50]}, SCALE), {}, corner=(380, 96, 198)
    ),
    "ome, a negative scale": Case(
        transformed({"type": "scale", "scale": [40, 8, -4]}),
        {},
        refused=r"scale = \[40, 8, -4\].*source\.array",
        advice=("{}", SIZED | {"array": "0"}),
    ),
    "ome, affine": Case(
        transformed({"type": "affine", "affine": [[1, 0, 0, 0]]}),
        {},
        refused=r'type = "affine".*source\.array',
        advice=("{}", SIZED | {"array": "0"}),
    ),
    "bioformats2raw": Case(LAYOUT, {}, corner=CENTRED, refused=r"as in \S+/0\.", advice=("{}/0", {})),
    # attributes of other tools
    "fibsem-tools, order F": Case(attributes(transform=ORDER_F), {}, corner=(380, 76, 38)),
    "fibsem-tools, axes x y z as stored": Case(
        attributes(np.ascontiguousarray(TRUTH.T), transform=ORDER_F | {"order": "C"}), {}, corner=(380, 76, 38)
    ),
    "funlib": Case(
        attributes(TRUTH[None], voxel_size=NM, offset=[400, 80, 40], units=NM3, axis_names=["c^", "z", "y", "x"]),
        {},
        corner=(400, 80, 40),
    ),
    "gunpowder without a unit": Case(
        attributes(resolution=NM, offset=[400, 80, 40]),
        {},
        corner=(400, 80, 40),
        refused=r"voxel_size_nm: \[40\.0, 8\.0, 4\.0\]",
        advice=("{}", SIZED),
    ),
    "n5-zarr, axes x y z": Case(
        attributes(resolution=[4, 8, 40], units=NM3, axes=["x", "y", "z"]), {}, refused=N5_TOOLS, advice=("{}", SIZED)
    ),
    "n5-zarr, factors": Case(
        attributes(resolution=[4, 8, 40], units="nm", downsamplingFactors=[1, 1, 1]),
        {},
        refused=N5_TOOLS,
        advice=("{}", SIZED),
    ),
    "n5-zarr, isotropic": Case(
        attributes(resolution=[5, 5, 5], units="nm", downsamplingFactors=[1, 1, 1]), {}, size=(5, 5, 5)
    ),
    # other languages, by hand
    "n5-zarr": Case(
        lambda path: hand.zarr2(
            path,
            WIDE.astype(">u2"),
            lambda part: gzip.compress(part.tobytes()),
            "/",
            dimension_separator="/",
            compressor={"id": "gzip", "level": -1, "useZlib": False},
        ),
        SIZED | {"intensity_window": (0, 65535)},
        window(WIDE, 0, 65535),
    ),
    "zarrs": Case(lambda path: hand.zarr3(path, codecs=["bytes"], _zarrs={"must_understand": False})),
    "zfp of zarrs": Case(
        lambda path: hand.zarr3(path, TRUTH.astype("f4"), codecs=[{"name": "zfp"}]), refused=r'name = "zfp".*Re-encode'
    ),
    # places that hold something else
    "webknossos": Case(webknossos, {}, url="{}/color/1"),
    "webknossos, the dataset": Case(webknossos, {}, refused=r"In it are color/1", advice=("{}/color/1", {})),
    "webknossos, the layer": Case(webknossos, {}, url="{}/color", refused=r"In it are 1\.", advice=("{}/color/1", {})),
    "webknossos, wkw": Case(wkw, refused=r"WKW files of WEBKNOSSOS.*zarr3"),
    "an empty folder": Case(nothing_but("notes.txt", ""), refused=r"no volume is at.*Check the url"),
    "a link of Neuroglancer": Case(
        by_zarr(), url="file://{}/|zarr3:", refused=r"Write zarr3://file://", advice=("zarr3://file://{}", SIZED)
    ),
    "an info without scales": Case(nothing_but("info", '{"layers": []}'), {}, refused=r"info has no scales.*folder"),
}


def check(url: str, settings: dict[str, Any], case: Case) -> None:
    source = open_source(SourceConfig(url=url, **settings))
    bounds = source.info.bounds
    assert bounds == Box(ZYX.of(case.start), ZYX.of(case.start) + ZYX.of(case.voxels.shape))
    assert source.info.voxel_size_nm == pytest.approx(case.size)
    assert source.info.corner_nm == pytest.approx(case.corner)
    np.testing.assert_array_equal(source.read(bounds), case.voxels)
    part = Box(ZYX(1, 3, 5), ZYX(6, 19, 18))
    np.testing.assert_array_equal(source.read(part.shift(bounds.start)), case.voxels[part.slices()])


@pytest.mark.parametrize("name", CASES)
def test_read_or_refused_with_advice_that_works(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "v"
    case.make(path)
    if not case.refused:
        check(case.url.format(path), case.settings, case)
        return
    with pytest.raises(EmsrError, match=case.refused) as caught:
        check(case.url.format(path), case.settings, case)
    assert "\n" not in str(caught.value)
    if case.advice is not None:
        check(case.advice[0].format(path), case.advice[1], case)


def test_sections_in_a_folder_are_brought_in_as_the_refusal_says(tmp_path: Path) -> None:
    sections(tmp_path / "tiffs")
    with pytest.raises(EmsrError, match=r"holds TIFF or PNG files.*python -m pipeline\.convert"):
        check(str(tmp_path / "tiffs"), SIZED, Case(sections))
    made = tmp_path / "made.zarr"
    assert convert([str(tmp_path / "tiffs"), str(made), "--voxel-size-nm", "40", "8", "4"]) == 0
    check(str(made), {}, Case(sections))


def test_suffixed_files_are_named_behind_a_server_that_denies_what_is_absent(tmp_path: Path) -> None:
    by_cloud_volume(compress="gzip")(tmp_path / "v")
    with serving(tmp_path) as server:
        server.absent = (403, b"")
        with pytest.raises(EmsrError, match=r"names ending in \.gz"):
            check(f"{server.url}/v", {}, Case(sections, start=(7, 0, 500)))
