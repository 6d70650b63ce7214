"""JPEG XL in precomputed volumes: cloud-volume's chunks are read, ours are read by it, and damage is never voxels."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import source_volumes as written
from cloudvolume import CloudVolume
from conftest import REPOSITORY, run_here, volume_yaml
from source_checks import edit, opened, refusal
from source_volumes import CHUNK, truth
from test_targets import array_of, fill, second_reader, small, whole

from pipeline import verify
from pipeline.base.errors import DamagedChunkError, MissingChunkError, TargetError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import FillConfig
from pipeline.plan.target_spec import FIDELITY, LevelSpec
from pipeline.storage import chunk_array, jpeg_xl
from pipeline.storage.targets.open import open_target
from pipeline.worker.check import runtime

ROWS = CHUNK[0] * CHUNK[1]


def image(voxels: np.ndarray, **changes: object) -> bytes:
    """A JPEG XL file by libjxl's defaults for what is not stated here: in a container, at a higher effort."""
    stated: dict[str, object] = {"lossless": True, "effort": 4, "usecontainer": True}
    return bytes(imagecodecs.jpegxl_encode(voxels, **(stated | changes)))


def grey(rows: int, columns: int, dtype: str = "uint8") -> np.ndarray:
    return (np.arange(rows)[:, None] * 3 + np.arange(columns) * 5).astype(dtype)


class TestSource:
    def test_a_box_across_chunks_and_levels(self, tmp_path: Path) -> None:
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", False, mips=2)
        edit(volume.path / "info", lambda v: v["scales"][1].update(jxl_quality=100))
        source = opened(volume)
        start = source.info.bounds.start
        box = Box(start + ZYX(3, 10, 14), start + ZYX(17, 40, 33))
        np.testing.assert_array_equal(source.read(box), truth()[3:17, 10:40, 14:33])
        assert opened(volume, mip=1).read(opened(volume, mip=1).info.bounds).shape == (20, 20, 25)

    def test_chunks_are_fetched_a_few_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", False)
        for at_once in (1, 2):
            monkeypatch.setattr(chunk_array, "_AT_ONCE_BYTES", at_once * int(np.prod(CHUNK)))
            source = opened(volume)
            np.testing.assert_array_equal(source.read(source.info.bounds), truth())

    def test_a_chunk_in_a_container(self, tmp_path: Path) -> None:
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", False)
        (volume.path / volume.chunk).write_bytes(image(grey(ROWS, CHUNK[2])))
        source = opened(volume)
        found = source.read(Box.at(source.info.bounds.start, ZYX.of(CHUNK)))
        np.testing.assert_array_equal(found.reshape(ROWS, -1), grey(ROWS, CHUNK[2]))

    def test_uint16(self, tmp_path: Path) -> None:
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", False)
        edit(volume.path / "info", lambda v: v.update(data_type="uint16"))
        (volume.path / volume.chunk).write_bytes(image(grey(ROWS, CHUNK[2], "uint16")))
        source = opened(volume, intensity_window=(0, 255))
        found = source.read(Box.at(source.info.bounds.start, ZYX.of(CHUNK)))
        np.testing.assert_array_equal(found.reshape(ROWS, -1), np.minimum(grey(ROWS, CHUNK[2], "uint16"), 255))

    @pytest.mark.parametrize(
        "wrong",
        [
            image(grey(ROWS, CHUNK[2] - 1)),
            image(grey(CHUNK[2], ROWS)),
            image(grey(ROWS, CHUNK[2], "uint16")),
            image(np.stack([grey(ROWS, CHUNK[2])] * 3, axis=-1)),
            image(grey(ROWS, CHUNK[2]))[:60],
            image(grey(ROWS, CHUNK[2]))[:9],
            b"",
            b"\xff\x0a",
            bytes(imagecodecs.jpeg8_encode(grey(ROWS, CHUNK[2]))),
            bytes(ROWS * CHUNK[2]),
        ],
        ids=["narrow", "turned", "uint16", "colour", "cut", "head", "empty", "magic", "jpeg", "raw"],
    )
    def test_another_image_is_damage(self, wrong: bytes, tmp_path: Path) -> None:
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", False)
        (volume.path / volume.chunk).write_bytes(wrong)
        source = opened(volume, missing_chunks=FillConfig(fill=9))
        with pytest.raises(DamagedChunkError):
            source.read(source.info.bounds)

    def test_a_cut_shard_is_damage(self, tmp_path: Path) -> None:
        volume = written.sharded_jpeg_xl(tmp_path / "v")
        file = volume.path / volume.chunk
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
        source = opened(volume, missing_chunks=FillConfig(fill=9))
        with pytest.raises(DamagedChunkError):
            source.read(source.info.bounds)

    def test_an_absent_chunk(self, tmp_path: Path) -> None:
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", False)
        (volume.path / volume.chunk).unlink()
        first = Box.at(opened(volume).info.bounds.start, ZYX.of(CHUNK))
        with pytest.raises(MissingChunkError, match=r"source\.missing_chunks"):
            opened(volume).read(first)
        filled = opened(volume, missing_chunks=FillConfig(fill=9)).read(opened(volume).info.bounds)
        expected = truth()
        expected[: CHUNK[0], : CHUNK[1], : CHUNK[2]] = 9
        np.testing.assert_array_equal(filled, expected)

    @pytest.mark.parametrize("compress", [False, "gzip"])
    def test_an_image_that_unpacks_to_much_more(self, compress: str | bool, tmp_path: Path) -> None:
        """In a process of its own, whose memory does not grow: the size is compared before pixels are decoded."""
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", compress)
        bomb = image(np.zeros((12_000, 12_000), np.uint8), effort=1)
        assert len(bomb) < 1 << 20
        (volume.path / volume.chunk).write_bytes(gzip.compress(bomb) if compress else bomb)
        program = f"""
import resource
from pipeline.base.errors import DamagedChunkError
from pipeline.config.volume import SourceConfig
from pipeline.storage.sources.open import open_source
source = open_source(SourceConfig(url={str(volume.path)!r}))
source.read(type(source.info.bounds)(source.info.bounds.start + 8, source.info.bounds.stop))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    source.read(source.info.bounds)
except DamagedChunkError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        command = [sys.executable, "-c", program]
        grown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120).stdout
        assert int(grown) < 64 << 10

    def test_other_types_and_encodings_are_refused_with_a_way(self, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")
        edit(volume.path / "info", lambda v: v.update(data_type="float32") or v["scales"][0].update(encoding="jxl"))
        assert "uint8 or uint16 in JPEG XL" in refusal(volume)
        for encoding, package in (("fpzip", "fpzip"), ("kempressed", "fpzip"), ("zfpc", "zfpc")):
            edit(volume.path / "info", lambda v, e=encoding: v["scales"][0].update(encoding=e))
            assert f"pip install {package}): vol.transfer_to" in refusal(volume)

    def test_the_advice_works(self, tmp_path: Path) -> None:
        """cloud-volume's transfer_to makes a raw volume of an encoded one, as messages say. Here of jxl."""
        volume = written.by_cloud_volume(tmp_path / "v", "jxl", False)
        vol = CloudVolume(f"file://{volume.path}", progress=False)
        vol.transfer_to(f"file://{tmp_path}/raw", vol.bounds, encoding="raw")
        source = opened(tmp_path / "raw")
        np.testing.assert_array_equal(source.read(source.info.bounds), truth())


class TestTarget:
    def test_bytes_do_not_depend_on_threads(self) -> None:
        voxels = truth((8, 256, 256))
        stored = jpeg_xl.encode(voxels)
        rows = voxels.reshape(-1, 256)
        assert stored == bytes(imagecodecs.jpegxl_encode(rows, lossless=True, effort=1, numthreads=8))
        assert stored[:2] == b"\xff\x0a"  # a bare codestream, as cloud-volume writes it
        assert jpeg_xl.encode(voxels[:, ::2, ::2]) == jpeg_xl.encode(voxels[:, ::2, ::2].copy())

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (5, 1, 1), (1, 3, 4), (2, 7, 3), (3, 1, 70_000)])
    def test_any_shape_comes_back(self, shape: tuple[int, int, int]) -> None:
        voxels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
        assert (jpeg_xl.decode(jpeg_xl.encode(voxels), ZYX.of(shape), "it") == voxels).all()

    def test_fidelity_is_lossless_too(self, tmp_path: Path) -> None:
        target = open_target(small(tmp_path.as_uri(), "precomputed", "jxl"))
        target.create()
        voxels = fill(target, FIDELITY)
        assert json.loads((tmp_path / "fidelity/info").read_text())["scales"][0]["encoding"] == "jxl"
        assert (second_reader(tmp_path, "precomputed", FIDELITY) == voxels).all()
        assert (target.read(FIDELITY, whole(target, FIDELITY)) == voxels).all()

    def test_unknown_and_other_arrays_are_refused(self, tmp_path: Path) -> None:
        target = open_target(small(tmp_path.as_uri(), "precomputed", "jxl"))
        with pytest.raises(TargetError, match="cannot be opened"):
            target.read(0, whole(target, 0))
        target.create()
        edit(tmp_path / "info", lambda v: v["scales"][0].update(size=[64, 104, 11]))
        with pytest.raises(TargetError, match="holds an array of"):
            target.read(0, whole(target, 0))
        (tmp_path / "info").write_bytes(b"[]")
        with pytest.raises(TargetError, match="cannot be opened"):
            target.read(1, Box(ZYX(0, 0, 0), array_of(target, 1).shape))

    def test_chunks_that_no_image_holds(self) -> None:
        for chunk in ((64, 8192, 64), (1, 64, 1 << 19)):
            one = LevelSpec(ZYX.of(chunk), ZYX.of(chunk), ZYX.of(chunk))
            with pytest.raises(TargetError, match="too large for jxl"):
                open_target(small("file:///t", "precomputed", "jxl", levels=(one,)))

    def test_a_runtime_names_the_encoder(self) -> None:
        """Other versions of libjxl may give other bytes; targets of other encodings keep the runtime they had."""
        assert "imagecodecs 20" in runtime("jxl").libraries
        assert "imagecodecs" not in runtime("blosc-zstd").libraries


@pytest.mark.parametrize("shard", [None, [2, 128, 128]])
def test_a_run_that_is_verified_and_found_damaged(shard: list[int] | None, tmp_path: Path) -> None:
    """A flipped bit may decode, since the format has no checksum: `verify` finds it all the same."""
    written.zarr3(tmp_path / "lr", voxels=truth((6, 40, 50)))
    keys = {"target__format": "precomputed", "target__encoding": "jxl", "target__chunk_shape": [2, 64, 64]}
    path = volume_yaml(
        tmp_path / "v.yaml", "lr", "sr", source__voxel_size_nm=[40, 8, 4], target__shard_shape=shard, **keys
    )
    job = run_here(path)
    levels = [np.asarray(CloudVolume(f"file://{tmp_path}/sr", mip=k, progress=False)[:])[..., 0].T for k in (0, 1)]
    assert levels[0].shape == (6, 320, 400)
    assert (open_target(job.target).read(1, Box(ZYX(0, 0, 0), ZYX.of(levels[1].shape))) == levels[1]).all()
    assert verify.main([str(path)]) == 0
    stored = min((tmp_path / "sr" / "0.5_1_40").iterdir())
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(bytes(data))
    assert verify.main([str(path)]) != 0
