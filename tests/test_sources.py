"""Every supported format, by other people's writers, reads back as the same voxels, whatever its levels and axes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import source_volumes as written
import zarr
from source_checks import at, edit, opened, refusal
from source_volumes import FORMATS, OFFSET, SHAPE, VOXEL_NM, Written, truth

from pipeline.base.errors import SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import SourceConfig
from pipeline.storage.sources.open import open_source


@pytest.fixture(scope="module", params=FORMATS)
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return FORMATS[request.param](tmp_path_factory.mktemp("sources") / request.param)


class TestEveryFormat:
    """The `Source` contract."""

    def test_info(self, volume: Written) -> None:
        info = opened(volume).info
        assert info.bounds == Box.at(ZYX.of(volume.start), ZYX.of(SHAPE))
        assert (info.dtype, info.format) == ("uint8", volume.format)
        assert info.chunk_shape == ZYX.of(written.CHUNK[::-1] if "xyz" in volume.path.name else written.CHUNK)
        assert info.voxel_size_nm == VOXEL_NM
        centre_at_zero = volume.path.name.startswith("ome")
        assert info.corner_nm == (tuple(-v / 2 for v in VOXEL_NM) if centre_at_zero else (0, 0, 0))
        assert info.url == f"file://{volume.path}"
        plain = "imagecodecs" if "jxl" in volume.path.name else "tensorstore"
        assert info.reader == ("cloud-volume" if volume.chunk.endswith((".gz", ".br", ".zstd")) else plain)

    def test_whole(self, volume: Written) -> None:
        source = opened(volume)
        voxels = source.read(source.info.bounds)
        assert voxels.dtype == np.uint8
        assert voxels.flags.c_contiguous
        assert voxels.shape == SHAPE
        assert np.abs(voxels.astype(int) - volume.voxels).max() <= volume.tolerance

    def test_random_boxes(self, volume: Written) -> None:
        source = opened(volume)
        whole = source.read(source.info.bounds)
        rng = random.Random(1)
        for _ in range(12):
            ends = [sorted(rng.sample(range(n + 1), 2)) for n in SHAPE]
            box = Box.of([e[0] for e in ends], [e[1] for e in ends])
            part = source.read(box.shift(ZYX.of(volume.start)))
            assert part.flags.c_contiguous
            np.testing.assert_array_equal(part, whole[box.slices()])

    def test_outside_is_an_error(self, volume: Written) -> None:
        source = opened(volume)
        bounds = source.info.bounds
        for box in (
            bounds.grow(1),
            bounds.shift(ZYX(0, 0, 1)),
            Box(bounds.stop, bounds.stop + 1),
            Box(bounds.stop, bounds.start),
        ):
            with pytest.raises(ValueError, match="not inside"):
                source.read(box)
        assert source.read(Box(bounds.start, bounds.start)).shape == (0, 0, 0)

    def test_two_threads(self, volume: Written) -> None:
        source = opened(volume)
        whole = source.read(source.info.bounds)
        boxes = [
            Box.at(ZYX(z, y, 3), ZYX(5, 9, 40)).shift(ZYX.of(volume.start))
            for z in range(0, 15, 3)
            for y in range(0, 30, 7)
        ]
        with ThreadPoolExecutor(2) as pool:
            for box, part in zip(boxes, pool.map(source.read, boxes), strict=True):
                np.testing.assert_array_equal(part, whole[box.slices(ZYX.of(volume.start))])

    def test_fingerprint_is_of_the_metadata_not_of_the_place(self, volume: Written, tmp_path: Path) -> None:
        copy = shutil.copytree(volume.path, tmp_path / "elsewhere")
        moved = open_source(SourceConfig(url=str(copy), voxel_size_nm=None if volume.has_voxel_size else VOXEL_NM))
        assert moved.info.fingerprint == opened(volume).info.fingerprint

    def test_forced_format(self, volume: Written) -> None:
        assert (
            open_source(SourceConfig(url=f"{volume.format}://{volume.path}", voxel_size_nm=VOXEL_NM)).info.format
            == volume.format
        )
        other = "n5" if volume.format == "precomputed" else "precomputed"
        with pytest.raises(SourceError, match="no volume is at"):
            open_source(SourceConfig(url=f"{other}://{volume.path}"))


def test_fingerprint_is_the_same_in_another_process_and_differs_between_levels(tmp_path: Path) -> None:
    ome = written.ome(tmp_path / "a", "0.5")
    first, second = (opened(ome, mip=mip).info.fingerprint for mip in (0, 1))
    script = "import sys\nfrom pipeline.config.volume import SourceConfig\n"
    script += "from pipeline.storage.sources.open import open_source\n"
    script += "print(open_source(SourceConfig(url=sys.argv[1])).info.fingerprint)"
    again = subprocess.run(
        [sys.executable, "-c", script, str(ome.path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert again.stdout.strip() == first != second
    edit(ome.path / "s0/zarr.json", lambda v: at(v, attributes={"note": "not of the voxels"}))
    assert opened(ome).info.fingerprint == first
    edit(
        ome.path / "s0/zarr.json",
        lambda v: at(v, chunk_grid={"name": "regular", "configuration": {"chunk_shape": [8, 16, 32]}}),
    )
    assert opened(ome).info.fingerprint != first


class TestLevels:
    @pytest.mark.parametrize(
        "make",
        [
            lambda p: written.ome(p, "0.4"),
            lambda p: written.ome(p, "0.5"),
            lambda p: written.ome(p, "0.5", "xyz"),
            written.n5_group,
        ],
    )
    def test_groups(self, make: Callable[[Path], Written], tmp_path: Path) -> None:
        volume = make(tmp_path / "v")
        source = opened(volume, mip=1)
        np.testing.assert_array_equal(source.read(source.info.bounds), written.halved(truth()))
        assert source.info.voxel_size_nm == (40, 16, 8)
        # both levels start at the same physical corner, whichever convention places their centres
        assert source.info.corner_nm == opened(volume).info.corner_nm
        message = refusal(volume, mip=2)
        assert "2 levels" in message
        assert "0 to 1" in message

    def test_precomputed_mips(self, tmp_path: Path) -> None:
        for compress, reader in ((False, "tensorstore"), ("gzip", "cloud-volume")):
            volume = written.by_cloud_volume(tmp_path / reader, compress=compress, mips=2)
            source = opened(volume, mip=1)
            assert (source.info.reader, source.info.voxel_size_nm) == (reader, (40, 16, 8))
            assert source.info.bounds.start == ZYX(OFFSET[0], OFFSET[1] // 2, OFFSET[2] // 2)
            np.testing.assert_array_equal(source.read(source.info.bounds), written.halved(truth()))
            assert "2 levels" in refusal(volume, mip=2)

    def test_one_unreadable_scale_does_not_hide_the_others(self, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")
        edit(volume.path / "info", lambda v: v["scales"].append(v["scales"][0] | {"key": "x", "encoding": "compresso"}))
        assert opened(volume).read(Box.at(ZYX.of(OFFSET), ZYX(1, 1, 1))).size == 1
        assert "compresso" in refusal(volume, mip=1)

    def test_array_inside_a_group(self, tmp_path: Path) -> None:
        ome = written.ome(tmp_path / "o", "0.5")
        named = opened(ome, array="s1")
        assert named.info == opened(ome, mip=1).info
        assert "both choose a level" in refusal(ome, array="s1", mip=1)
        assert "no Zarr v3 array is there" in refusal(ome, array="s7")
        for outside in ("../o/s1", "", "s1/../s0"):
            assert "inside the group" in refusal(ome, array=outside)
        plain = zarr.open_group(tmp_path / "g", mode="w", zarr_format=2)
        plain.create_array("raw/em", shape=SHAPE, chunks=written.CHUNK, dtype="u1")[...] = truth()
        source = opened(tmp_path / "g", array="raw/em", voxel_size_nm=VOXEL_NM)
        np.testing.assert_array_equal(source.read(source.info.bounds), truth())
        assert "Name one by source.array: raw/em" in refusal(tmp_path / "g")
        assert "that is a group" in refusal(tmp_path / "g", array="raw")
        n5 = written.n5_group(tmp_path / "n")
        assert opened(n5, array="s1").info == opened(n5, mip=1).info
        assert "both choose a level" in refusal(n5, array="s1", mip=1)
        assert "Take source.array away" in refusal(written.n5(tmp_path / "m"), array="s0")
        assert "Take source.array away" in refusal(written.precomputed(tmp_path / "p"), array="s0")
        assert "Take source.array away" in refusal(written.zarr3(tmp_path / "z"), array="s0")

    @pytest.mark.parametrize("make", [written.zarr2, written.zarr3, written.n5, written.precomputed])
    def test_a_plain_array_has_one_level(self, make: Callable[[Path], Written], tmp_path: Path) -> None:
        assert "1 level" in refusal(make(tmp_path / "v"), mip=1)


class TestAxes:
    @pytest.mark.parametrize("names", ["zyx", "xyz", "yxz", "czyx", "tczyx", "txyz"])
    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    def test_named(self, names: str, version: str, tmp_path: Path) -> None:
        source = opened(written.ome(tmp_path / "v", version, names))
        assert source.info.chunk_shape == ZYX.of(
            [written.CHUNK[[n for n in names if n in "zyx"].index(a)] for a in "zyx"]
        )
        np.testing.assert_array_equal(source.read(source.info.bounds), truth())

    def test_dimension_names_without_ome(self, tmp_path: Path) -> None:
        v3 = written.zarr3(tmp_path / "a", voxels=truth().transpose(2, 1, 0), dimension_names=["x", "y", "z"])
        np.testing.assert_array_equal(opened(v3).read(Box.of((0, 0, 0), SHAPE)), truth())
        v2 = written.zarr2(tmp_path / "b", voxels=truth().transpose(1, 2, 0))
        (v2.path / ".zattrs").write_text(json.dumps({"_ARRAY_DIMENSIONS": ["y", "x", "z"]}))
        np.testing.assert_array_equal(opened(v2).read(Box.of((0, 0, 0), SHAPE)), truth())

    def test_leading_axes_of_length_one_are_dropped(self, tmp_path: Path) -> None:
        for make in (written.zarr2, written.zarr3):
            source = opened(make(tmp_path / make.__name__, voxels=truth()[None, None]))
            np.testing.assert_array_equal(source.read(source.info.bounds), truth())

    def test_n5_axes_in_c_order(self, tmp_path: Path) -> None:
        volume = written.n5(tmp_path / "v", voxels=truth().transpose(2, 1, 0))
        edit(
            volume.path / "attributes.json",
            lambda v: at(v, axes=["z", "y", "x"], resolution=VOXEL_NM, pixelResolution=None),
        )
        source = opened(volume)
        np.testing.assert_array_equal(source.read(source.info.bounds), truth())
        assert source.info.voxel_size_nm == VOXEL_NM

    def test_refused_shapes(self, tmp_path: Path) -> None:
        for n, (axes, shape, word) in enumerate(
            [
                ("czyx", (3, 4, 8, 8), "colour image"),
                ("tzyx", (2, 4, 8, 8), "time series"),
                ("yx", (8, 8), "2-D"),
                ("cyx", (1, 8, 8), "each of z, y and x"),
            ]
        ):
            path = tmp_path / str(n)
            zarr.create_array(path, shape=shape, chunks=shape, dtype="u1", zarr_format=3, dimension_names=list(axes))
            assert word in refusal(path, voxel_size_nm=VOXEL_NM)
        zarr.create_array(tmp_path / "plain", shape=(3, 4, 8, 8), chunks=(1, 4, 8, 8), dtype="u1", zarr_format=2)
        assert "more than three axes" in refusal(tmp_path / "plain", voxel_size_nm=VOXEL_NM)
        rgb = written.precomputed(tmp_path / "rgb")
        edit(rgb.path / "info", lambda v: at(v, num_channels=3))
        assert "colour image" in refusal(rgb)

    def test_contradicting_names(self, tmp_path: Path) -> None:
        volume = written.ome(tmp_path / "v", "0.5")
        edit(volume.path / "s0/zarr.json", lambda v: at(v, dimension_names=["x", "y", "z"]))
        assert "the multiscales say" in refusal(volume)


def test_real_em(shared_data: Path, tmp_path: Path) -> None:
    """A corner of a real volume in three formats, against the TIFF as tifffile reads it."""
    import tifffile

    em = tifffile.imread(shared_data / "flyem-medulla-z40" / "raw.tif")[:20, :128, :128]
    for make in (
        lambda p: written.zarr3(p, sharded=True, voxels=em),
        lambda p: written.n5(p, voxels=em),
        lambda p: written.precomputed(p, "png", voxels=em),
    ):
        volume = make(tmp_path / str(len(list(tmp_path.iterdir()))))
        source = opened(volume)
        np.testing.assert_array_equal(source.read(source.info.bounds), em)
