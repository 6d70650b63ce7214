"""Targets: objects are a function of the voxels, keys are arithmetic, independent readers see the same volume."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import numpy as np
import pytest
import tensorstore as ts
import zarr
from cloudvolume import CloudVolume
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from ome_zarr_models.v05.image import Image

from pipeline.base.errors import DamagedChunkError, MissingChunkError, TargetError, TransientError, UserError
from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.plan.target_spec import FIDELITY, LevelSpec, TargetSpec
from pipeline.storage.precomputed_morton import shard_shapes
from pipeline.storage.targets import zarr_shard_files
from pipeline.storage.targets.open import is_empty, open_target
from pipeline.storage.targets.precomputed_target import voxel_offset
from pipeline.storage.volume import Target, Uint8Array

CASES = [
    ("ome-zarr", "raw"),
    ("ome-zarr", "zstd"),
    ("ome-zarr", "blosc-zstd"),
    ("precomputed", "raw"),
    ("precomputed", "png"),
    ("precomputed", "jpeg"),
    ("precomputed", "jxl"),
]


def level(shape: tuple[int, int, int], chunk: tuple[int, int, int], shard: tuple[int, int, int]) -> LevelSpec:
    return LevelSpec(ZYX.of(shape), ZYX.of(chunk), ZYX.of(shard))


def small(url: str, form: str = "ome-zarr", encoding: str = "raw", sharded: bool = True, **changes: Any) -> TargetSpec:
    """Three levels and fidelity, no edge a multiple of anything; the shards are possible in both formats."""
    chunk = (4, 16, 16)
    shards = [(8, 32, 32), (4, 32, 32), (4, 16, 32)] if sharded else [chunk] * 3
    levels = tuple(
        level(shape, chunk, shard)
        for shape, shard in zip([(11, 104, 77), (11, 52, 39), (11, 26, 20)], shards, strict=True)
    )
    spec = TargetSpec(
        url,
        form,
        encoding,
        8,
        (45.0, 4.625, 4.625),
        (-22.5, -18.5, -18.5),
        levels,
        level((11, 13, 10), (4, 8, 8), (4, 8, 8)),
        {"network": "x"},
    )
    return replace(spec, **changes)


def whole(target: Target, k: int) -> Box:
    return Box(ZYX(0, 0, 0), array_of(target, k).shape)


def array_of(target: Target, k: int) -> LevelSpec:
    found = target.spec.fidelity if k == FIDELITY else target.spec.levels[k]
    assert found is not None
    return found


def texture(shape: ZYX, seed: int = 0) -> Uint8Array:
    """Smooth, with grain, and zeros in the first chunk of every axis: stores like to leave zeros out."""
    z, y, x = np.ogrid[: shape.z, : shape.y, : shape.x]
    grain = np.random.default_rng(seed).integers(0, 8, tuple(shape))
    voxels: Uint8Array = (110 + 60 * np.sin(y / 9 + z / 5) + 50 * np.cos(x / 7) + grain).astype(np.uint8)
    voxels[:4, :16, :16] = 0
    voxels[-1, -1, -1] = 0
    return voxels


def fill(target: Target, k: int) -> Uint8Array:
    """Write level `k` shard by shard and return what was written."""
    box = whole(target, k)
    voxels = texture(box.shape, seed=k + 1)
    for piece in grid_parts(box, array_of(target, k).shard):
        target.put(target.encode(k, piece, voxels[piece.slices()]))
    return voxels


def second_reader(folder: Path, form: str, k: int) -> Uint8Array:
    """The level as zarr-python or cloud-volume see it, (z, y, x)."""
    if form == "ome-zarr":
        array = zarr.open_array(folder / ("fidelity/0" if k == FIDELITY else str(k)), mode="r")
        return np.asarray(array[...], np.uint8)
    at = (folder / "fidelity" if k == FIDELITY else folder).as_uri()
    volume = CloudVolume(f"precomputed://{at}", mip=max(k, 0), fill_missing=False, progress=False)
    voxels: Uint8Array = np.asarray(volume[volume.bounds])[..., 0].T
    return voxels


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("form", "encoding"), CASES)
def test_independent_readers_see_what_was_written(tmp_path: Path, form: str, encoding: str, sharded: bool) -> None:
    target = open_target(small(tmp_path.as_uri(), form, encoding, sharded))
    target.create()
    for k in (0, 1, 2, FIDELITY):
        voxels = fill(target, k)
        read, theirs = target.read(k, whole(target, k)), second_reader(tmp_path, form, k)
        assert np.array_equal(theirs, read)
        if encoding == "jpeg" and k != FIDELITY:
            assert np.abs(read.astype(int) - voxels).mean() < 3
        else:
            assert np.array_equal(read, voxels)
        part = Box.of((3, 5, 1), (9, 12, 9))
        assert np.array_equal(target.read(k, part), read[part.slices()])


def random_box(data: st.DataObject, one: LevelSpec) -> Box:
    """Whole shards, any of them."""
    grid = one.shape.ceil_div(one.shard)
    start = ZYX(*(data.draw(st.integers(0, n - 1)) for n in grid))
    stop = ZYX(*(data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid, strict=True)))
    return Box(start * one.shard, (stop * one.shard).minimum(one.shape))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_keys_are_those_of_the_encoded_objects(data: st.DataObject) -> None:
    """For random arrays, shards, offsets and boxes; all zeros, so that nothing may be left out as empty."""
    form = data.draw(st.sampled_from(["ome-zarr", "precomputed"]))
    shape, chunk = (ZYX(*(data.draw(st.integers(1, high)) for _ in range(3))) for high in (20, 6))
    if form == "precomputed":
        in_chunks = data.draw(st.sampled_from(shard_shapes(shape.ceil_div(chunk))))
    else:
        in_chunks = ZYX(*(data.draw(st.integers(1, 3)) for _ in range(3)))
    one = LevelSpec(shape, chunk, in_chunks * chunk)
    corner = (data.draw(st.integers(-9, 9)) * 45.0, data.draw(st.integers(-9, 9)) * 2.0, -6.0)
    target = open_target(TargetSpec("file:///nowhere", form, "raw", 8, (45.0, 4.0, 4.0), corner, (one,), one, {}))
    k = data.draw(st.sampled_from([0, FIDELITY]))
    box = random_box(data, one)
    objects = target.encode(k, box, np.zeros(tuple(box.shape), np.uint8))
    assert list(objects) == sorted(objects) == target.keys(k, box)
    assert len(objects) == sum(1 for _ in grid_parts(box, one.shard))


@pytest.mark.parametrize(
    ("form", "encoding"),
    [("ome-zarr", "blosc-zstd"), ("precomputed", "raw"), ("precomputed", "jpeg"), ("precomputed", "jxl")],
)
def test_the_same_bytes_whatever_else_runs_and_however_the_box_is_cut(form: str, encoding: str) -> None:
    target = open_target(small("file:///nowhere", form, encoding))
    box = whole(target, 0)
    voxels = texture(box.shape)
    once = target.encode(0, box, voxels)
    with ThreadPoolExecutor(6) as pool:
        assert all(again == once for again in pool.map(lambda _: target.encode(0, box, voxels), range(12)))
    pieces: dict[str, bytes] = {}
    for piece in reversed(list(grid_parts(box, array_of(target, 0).shard))):
        pieces |= pickle.loads(pickle.dumps(target)).encode(0, piece, voxels[piece.slices()])
    assert pieces == once


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_shards_of_zarr_are_those_of_tensorstore(data: st.DataObject) -> None:
    """Byte for byte, for random arrays, chunks, shards and boxes, however few chunks are encoded at a time."""
    shape, chunk, in_chunks = (ZYX(*(data.draw(st.integers(1, high)) for _ in range(3))) for high in (20, 6, 3))
    one = LevelSpec(shape, chunk, in_chunks * chunk)
    encoding = data.draw(st.sampled_from(["raw", "zstd", "blosc-zstd"]))
    spec = TargetSpec("file:///nowhere", "ome-zarr", encoding, 8, (45.0, 4.0, 4.0), (0.0, 0.0, 0.0), (one,), None, {})
    box, seed = random_box(data, one), data.draw(st.integers(0, 9))
    voxels = np.random.default_rng(seed).integers(0, 1 if seed == 0 else 256, tuple(box.shape), dtype=np.uint8)
    context = ts.Context()
    metadata = json.loads(open_target(spec).metadata()["0/zarr.json"])
    memory = {"kvstore": "memory://0/", "store_data_equal_to_fill_value": True}
    array = ts.open({"driver": "zarr3", "metadata": metadata} | memory, create=True, context=context).result()
    array[box.slices()].write(voxels).result()
    store = ts.KvStore.open("memory://", context=context).result()
    wanted = {key.decode(): store.read(key).result().value for key in store.list().result() if b"/c/" in key}
    usual = zarr_shard_files.AT_ONCE_BYTES
    for at_once in (1, 2 * chunk.product, usual):
        zarr_shard_files.AT_ONCE_BYTES = at_once
        try:
            assert open_target(spec).encode(0, box, voxels) == wanted
        finally:
            zarr_shard_files.AT_ONCE_BYTES = usual


@pytest.mark.parametrize("form", ["ome-zarr", "precomputed"])
def test_boxes_that_are_not_whole_shards_are_refused(form: str) -> None:
    target = open_target(small("file:///nowhere", form))
    for start, stop in [
        ((0, 0, 16), (8, 32, 64)),
        ((0, 0, 0), (4, 32, 32)),
        ((8, 0, 0), (12, 32, 32)),
        ((0, 0, 0), (0, 32, 32)),
        ((-8, 0, 0), (8, 32, 32)),
    ]:
        box = Box.of(start, stop)
        with pytest.raises(ValueError, match="whole shards"):
            target.encode(0, box, np.zeros(tuple(box.shape), np.uint8))
        with pytest.raises(ValueError, match="whole shards"):
            target.keys(0, box)
    for wrong in (np.zeros((8, 32, 31), np.uint8), np.zeros((8, 32, 32), np.int16)):
        with pytest.raises(ValueError, match="takes uint8"):
            target.encode(0, Box.of((0, 0, 0), (8, 32, 32)), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no level 3"):
        target.keys(3, Box.of((0, 0, 0), (8, 32, 32)))


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("form", ["ome-zarr", "precomputed"])
def test_a_missing_shard_is_an_error_or_the_stated_value(tmp_path: Path, form: str, sharded: bool) -> None:
    target = open_target(small(tmp_path.as_uri(), form, "raw", sharded))
    target.create()
    voxels = fill(target, 0)
    shard = array_of(target, 0).shard
    gone = Box.at(ZYX(0, 1, 1) * shard, shard)
    key = target.keys(0, gone)[0]
    (tmp_path / key).unlink()
    assert list(target.get([key])) == [(key, None)]
    with pytest.raises(MissingChunkError):
        target.read(0, whole(target, 0))
    with pytest.raises(MissingChunkError):
        target.read(0, gone)
    voxels[gone.slices()] = 9
    assert np.array_equal(target.read(0, whole(target, 0), absent=9), voxels)
    assert target.read(0, Box.of((0, 0, 0), (4, 16, 16))).max() == 0


@pytest.mark.parametrize("form", ["ome-zarr", "precomputed"])
def test_half_a_shard_is_damage_not_absence(tmp_path: Path, form: str) -> None:
    target = open_target(small(tmp_path.as_uri(), form))
    target.create()
    fill(target, 0)
    box = Box.of((0, 32, 32), (8, 64, 64))
    # The same shard of an array that ends inside it: fewer chunks, and no others.
    shorter = small(tmp_path.as_uri(), form, levels=(level((11, 104, 48), (4, 16, 16), (8, 32, 32)),))
    if form == "ome-zarr":
        part = Box.of((0, 32, 32), (8, 64, 48))
        target.put(open_target(shorter).encode(0, part, texture(part.shape)))
    else:
        key = target.keys(0, box)[0]
        stored = (tmp_path / key).read_bytes()
        (tmp_path / key).write_bytes(bytes(16) + stored[16:])  # an index that lists no chunk
    with pytest.raises(DamagedChunkError, match="a chunk of it is missing"):
        target.read(0, box, absent=0)


@pytest.mark.parametrize(
    ("form", "encoding"),
    [
        ("ome-zarr", "blosc-zstd"),
        ("ome-zarr", "zstd"),
        ("precomputed", "jpeg"),
        ("precomputed", "jxl"),
        ("precomputed", "raw"),
    ],
)
def test_a_cut_object_is_damage(tmp_path: Path, form: str, encoding: str) -> None:
    target = open_target(small(tmp_path.as_uri(), form, encoding))
    target.create()
    fill(target, 0)
    box = Box.of((0, 32, 32), (8, 64, 64))
    path = tmp_path / target.keys(0, box)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for absent in (None, 0):
        with pytest.raises(DamagedChunkError):
            target.read(0, box, absent)


@pytest.mark.parametrize("form", ["ome-zarr", "precomputed"])
def test_create_gives_the_same_bytes_again(tmp_path: Path, form: str) -> None:
    def tree() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    assert is_empty(tmp_path.as_uri())
    assert is_empty((tmp_path / "not/there").as_uri())
    spec = small(tmp_path.as_uri(), form)
    open_target(spec).create()
    first = tree()
    assert not is_empty(tmp_path.as_uri())
    open_target(replace(spec, provenance=dict(reversed(spec.provenance.items())))).create()
    assert tree() == first
    assert all(str(tmp_path).encode() not in value for value in first.values())


def test_empty_folders_are_nothing_and_a_file_is_something(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    assert is_empty(tmp_path.as_uri())
    (tmp_path / "a/b/c").write_bytes(b"")
    assert not is_empty(tmp_path.as_uri())
    assert not is_empty((tmp_path / "a/b/c").as_uri())


def test_ome_metadata_is_valid_and_in_its_place(tmp_path: Path) -> None:
    target = open_target(small(tmp_path.as_uri(), "ome-zarr", "blosc-zstd"))
    target.create()
    for group, count in ((".", 3), ("fidelity", 1)):
        image = Image.from_zarr(zarr.open_group(tmp_path / group, mode="r"))
        (multiscale,) = image.attributes.ome.multiscales
        assert len(multiscale.datasets) == count
        assert [(axis.name, axis.type, axis.unit) for axis in multiscale.axes] == [
            (n, "space", "nanometer") for n in "zyx"
        ]
    root = json.loads((tmp_path / "zarr.json").read_bytes())["attributes"]
    assert root["emsr"] == {"network": "x"}
    assert root["ome"]["version"] == "0.5"
    # By hand, from LR voxels of 45 x 37 x 37 nm whose first centre is at 0: the corner is at -22.5, -18.5, -18.5;
    # SR voxels of 4.625 have their first centre at -18.5 + 2.3125, mip 1 at -18.5 + 4.625, mip 2 at -18.5 + 9.25.
    steps = [d["coordinateTransformations"] for d in root["ome"]["multiscales"][0]["datasets"]]
    assert [s[0]["scale"] for s in steps] == [[45.0, 4.625, 4.625], [45.0, 9.25, 9.25], [45.0, 18.5, 18.5]]
    assert [s[1]["translation"] for s in steps] == [
        [0.0, -16.1875, -16.1875],
        [0.0, -13.875, -13.875],
        [0.0, -9.25, -9.25],
    ]
    fidelity = json.loads((tmp_path / "fidelity/zarr.json").read_bytes())["attributes"]["ome"]["multiscales"][0][
        "datasets"
    ][0]
    assert [next(v for n, v in s.items() if n != "type") for s in fidelity["coordinateTransformations"]] == [
        [45.0, 37.0, 37.0],
        [0.0, 0.0, 0.0],
    ]
    array = zarr.open_array(tmp_path / "0", mode="r")
    assert (array.chunks, array.shards, array.metadata.dimension_names) == ((4, 16, 16), (8, 32, 32), ("z", "y", "x"))


def test_precomputed_metadata_is_read_by_cloud_volume(tmp_path: Path) -> None:
    target = open_target(small(tmp_path.as_uri(), "precomputed", "jpeg"))
    target.create()
    volume = CloudVolume(f"precomputed://{tmp_path.as_uri()}", progress=False)
    assert [scale["key"] for scale in volume.info["scales"]] == ["4.625_4.625_45", "9.25_9.25_45", "18.5_18.5_45"]
    assert [tuple(volume.mip_resolution(k)) for k in range(3)] == [
        (4.625, 4.625, 45),
        (9.25, 9.25, 45),
        (18.5, 18.5, 45),
    ]
    # By hand: the corner is half an LR voxel, 4 SR voxels, below 0; half a section below 0 rounds to section 0.
    assert [tuple(volume.mip_voxel_offset(k)) for k in range(3)] == [(-4, -4, 0), (-2, -2, 0), (-1, -1, 0)]
    assert volume.provenance.processing == [{"method": {"network": "x"}, "by": ""}]
    assert (volume.encoding, volume.info["scales"][0]["jpeg_quality"]) == ("jpeg", 90)
    fidelity = CloudVolume(f"precomputed://{(tmp_path / 'fidelity').as_uri()}", progress=False)
    assert (fidelity.encoding, tuple(fidelity.resolution)) == ("raw", (37, 37, 45))


def test_voxel_offsets_by_hand() -> None:
    size = (40.0, 0.55, 0.55)  # LR 4.4 nm at x8
    assert voxel_offset((-20.0, -2.2, -2.2), size, 0) == ZYX(0, -4, -4)
    assert voxel_offset((100 * 40 - 20.0, 4.4 * 1001 - 2.2, 0.0), size, 0) == ZYX(100, 8004, 0)
    assert voxel_offset((0.0, 5 * 0.55, -5 * 0.55), size, 0) == ZYX(0, 5, -5)
    assert voxel_offset((0.0, 5 * 0.55, -5 * 0.55), size, 1) == ZYX(0, 2, -3)
    assert voxel_offset((0.0, 5 * 0.55, -5 * 0.55), size, 3) == ZYX(0, 0, -1)


def test_what_the_formats_cannot_hold_is_refused_with_advice() -> None:
    one = level((16, 256, 256), (4, 16, 16), (4, 64, 64))
    with pytest.raises(TargetError, match=r"the nearest is \(8, 64, 64\)"):
        open_target(small("file:///t", "precomputed", levels=(one,)))
    with pytest.raises(TargetError, match="not a multiple of chunk_shape"):
        open_target(small("file:///t", levels=(level((16, 256, 256), (4, 16, 16), (4, 40, 64)),)))
    with pytest.raises(TargetError, match="too large for jpeg"):
        open_target(
            small("file:///t", "precomputed", "jpeg", levels=(level((256, 256, 256), (256, 256, 16), (256, 256, 16)),))
        )
    with pytest.raises(TargetError, match="encoding jpeg"):
        open_target(small("file:///t", "ome-zarr", "jpeg"))
    for url in ("https://example.org/x", "http://127.0.0.1/x"):
        with pytest.raises(TargetError, match="cannot be written"):
            open_target(small(url))
    with pytest.raises(ValueError, match="not half"):
        open_target(small("file:///t", levels=(one, one)))


def test_a_target_that_is_not_there_or_another_is_told(tmp_path: Path) -> None:
    box = Box.of((0, 0, 0), (1, 1, 1))
    for form in ("ome-zarr", "precomputed"):
        with pytest.raises(TargetError, match="cannot be opened"):
            open_target(small((tmp_path / form).as_uri(), form)).read(0, box)
        open_target(small((tmp_path / form).as_uri(), form)).create()
        other = small((tmp_path / form).as_uri(), form, levels=(level((9, 104, 77), (4, 16, 16), (8, 32, 32)),))
        with pytest.raises(TargetError, match="holds an array of"):
            open_target(other).read(0, box)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        open_target(small((tmp_path / "file").as_uri())).create()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server on this machine with one bucket, found by the environment alone."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    urlopen(
        Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")
    ).close()  # its memory is the process's, not the server's
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


@pytest.mark.parametrize(
    ("form", "encoding"), [("ome-zarr", "blosc-zstd"), ("precomputed", "jpeg"), ("precomputed", "jxl")]
)
def test_the_same_objects_on_s3(tmp_path: Path, s3: Any, form: str, encoding: str) -> None:
    """One PUT per object; what lies there, copied to a folder by boto3, is what the independent reader reads."""
    url = "s3://bucket/some/volume"
    assert is_empty(url)
    s3.put_object(Bucket="bucket", Key="some/volume-2/zarr.json", Body=b"")
    assert is_empty(url)
    target = open_target(small(url, form, encoding))
    target.create()
    assert not is_empty(url)
    fill(target, 0)
    for entry in s3.list_objects_v2(Bucket="bucket", Prefix="some/volume/")["Contents"]:
        path = tmp_path / entry["Key"].removeprefix("some/volume/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.get_object(Bucket="bucket", Key=entry["Key"])["Body"].read())
    assert np.array_equal(second_reader(tmp_path, form, 0), target.read(0, whole(target, 0)))
    with pytest.raises(MissingChunkError):
        target.read(1, whole(target, 1))
    s3.put_object(Bucket="bucket", Key="odd/deep/thing", Body=b"")
    assert not is_empty("s3://bucket/odd")
    with pytest.raises(UserError):
        open_target(small("s3://no-such-bucket/volume")).create()


def crc32c(data: bytes) -> int:
    """Castagnoli's polynomial, reflected, bit by bit: RFC 3720, appendix B.4, whose example is checked below."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_index_of_a_zarr_shard_is_checked(tmp_path: Path) -> None:
    """At the shard's end: offset and length of each chunk, and the crc32c of these. Every reader tells damage to it."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    target = open_target(small(tmp_path.as_uri()))
    target.create()
    fill(target, 0)
    box = Box.of((0, 32, 32), (8, 64, 64))
    path = tmp_path / target.keys(0, box)[0]
    shard, chunk, chunks = path.read_bytes(), 4 * 16 * 16, 8
    index, check = shard[-16 * chunks - 4 : -4], shard[-4:]
    assert len(shard) == chunks * chunk + len(index) + 4
    entries = np.frombuffer(index, "<u8").reshape(-1, 2)
    assert sorted(entries[:, 0].tolist()) == [i * chunk for i in range(chunks)]
    assert (entries[:, 1] == chunk).all()
    assert int.from_bytes(check, "little") == crc32c(index)
    swapped = index[16:32] + index[:16] + index[32:]
    path.write_bytes(shard[: -16 * chunks - 4] + swapped + check)
    with pytest.raises(DamagedChunkError, match="Digest mismatch"):
        target.read(0, box)
    with pytest.raises(ValueError, match="checksum"):
        second_reader(tmp_path, "ome-zarr", 0)


def test_voxel_offsets_do_not_fall_below_their_half_by_the_last_bit() -> None:
    """Three halves of 0.55 nm are 0.825 nm, and in floating point 0.825 / 0.55 is less than 1.5: rounded up too."""
    assert 0.825 / 0.55 < 1.5
    assert voxel_offset((0.825, 0.825, -0.825), (0.55, 0.55, 0.55), 0) == ZYX(2, 2, -1)


def test_an_array_of_another_shape_is_not_read(tmp_path: Path) -> None:
    """Somebody has put another volume in the target's place: its voxels are not taken for this one's."""
    other = level((11, 104, 64), (4, 16, 16), (8, 32, 32))
    open_target(small(tmp_path.as_uri(), levels=(other,))).create()
    with pytest.raises(TargetError, match=r"holds an array of \(11, 104, 64\)"):
        open_target(small(tmp_path.as_uri())).read(0, Box.of((0, 0, 0), (8, 32, 32)))


def test_a_target_out_of_reach_is_a_passing_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again, and not taken for a target that was never created."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        with pytest.raises(TransientError):
            open_target(small("s3://brain/sr")).read(0, Box.of((0, 0, 0), (8, 32, 32)))
