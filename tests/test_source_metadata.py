"""What a source's metadata says of voxel sizes and intensities is believed; what is unreadable is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_volumes as written
import tensorstore as ts
import zarr
import zarr.codecs
from source_checks import at, edit, opened, refusal
from source_volumes import SHAPE, VOXEL_NM, Written, truth

from pipeline.base.errors import SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import MaskConfig, SourceConfig
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.volume import VolumeInfo


class TestVoxelSize:
    @pytest.mark.parametrize(
        ("unit", "per_nm"),
        [("micrometer", 1e-3), ("angstrom", 10), ("millimeter", 1e-6), ("meter", 1e-9), ("nanometer", 1)],
    )
    def test_units(self, unit: str, per_nm: float, tmp_path: Path) -> None:
        info = opened(written.ome(tmp_path / "v", "0.4", unit=unit, per_nm=per_nm), mip=1).info
        assert info.voxel_size_nm == (40, 16, 8)
        assert info.corner_nm == (-20, -4, -2)

    def test_transformations_of_the_whole_group(self, tmp_path: Path) -> None:
        volume = written.ome(tmp_path / "v", "0.4")
        after = [{"type": "scale", "scale": [2, 1, 1]}, {"type": "translation", "translation": [0, 0, 100]}]
        edit(volume.path / ".zattrs", lambda v: at(v["multiscales"][0], coordinateTransformations=after))
        info = opened(volume, mip=1).info
        assert info.voxel_size_nm == (80, 16, 8)
        assert info.corner_nm == (-40, -4, 98)  # x: translation 2 + 100 is the centre of a voxel of 8

    @pytest.mark.parametrize("make", [written.ome, written.n5, written.precomputed])
    def test_given_twice(self, make: Callable[..., Written], tmp_path: Path) -> None:
        volume = make(tmp_path / "v", "0.5") if make is written.ome else make(tmp_path / "v")
        assert opened(volume, voxel_size_nm=(40.0, 8.0, 4.003)).info.voxel_size_nm == VOXEL_NM
        message = refusal(volume, voxel_size_nm=(40.0, 8.0, 4.005))
        assert "4.005" in message
        assert "40.0, 8.0, 4.0]" in message

    def test_nowhere(self, tmp_path: Path) -> None:
        assert "Give source.voxel_size_nm" in refusal(written.zarr3(tmp_path / "a").path)
        unitless = written.ome(tmp_path / "b", "0.5", unit=None)
        assert "Give source.voxel_size_nm" in refusal(unitless)
        info = opened(unitless, voxel_size_nm=(30.0, 6.0, 6.0)).info
        assert (info.voxel_size_nm, info.corner_nm) == ((30, 6, 6), (-15, -3, -3))
        n5 = written.n5(tmp_path / "c")
        edit(n5.path / "attributes.json", lambda v: at(v, pixelResolution={"dimensions": [1, 1, 1], "unit": "pixel"}))
        assert "Give source.voxel_size_nm" in refusal(n5)

    def test_n5_dialects(self, tmp_path: Path) -> None:
        for n, (attributes, group, size) in enumerate(
            [
                ({"resolution": [4, 8, 40]}, {}, (40, 8, 4)),
                ({"resolution": [0.004, 0.008, 0.04], "units": ["um", "um", "um"]}, {}, (40, 8, 4)),
                (
                    {
                        "pixelResolution": {"dimensions": [0.004, 0.008, 0.04], "unit": "um"},
                        "downsamplingFactors": [2, 2, 1],
                    },
                    {},
                    (40, 16, 8),
                ),
                ({"pixelResolution": [4, 8, 40]}, {"resolution": [1, 1, 1]}, (40, 8, 4)),
                (
                    {},
                    {"pixelResolution": {"dimensions": [4, 8, 40], "unit": "nm"}, "scales": [[1, 1, 1], [2, 2, 1]]},
                    (40, 16, 8),
                ),
                ({}, {"resolution": [4, 8, 40]}, None),
                ({}, {"resolution": [4, 8, 40], "scales": [[1, 1, 1]]}, "scales"),
            ]
        ):
            volume = written.n5_group(tmp_path / str(n))
            (volume.path / "attributes.json").write_text(json.dumps(group))
            keep = {"dimensions", "blockSize", "dataType", "compression"}
            edit(volume.path / "s1/attributes.json", lambda v, a=attributes, k=keep: {key: v[key] for key in k} | a)
            if isinstance(size, tuple):
                assert opened(volume, mip=1).info.voxel_size_nm == size
            else:
                assert (size or "Give source.voxel_size_nm") in refusal(volume, mip=1)


class TestIntensity:
    @pytest.mark.parametrize("window", [(0, 65535), (1000, 1255), (12000, 40000), (5, 6)])
    def test_uint16_is_mapped_linearly_rounding_half_up(self, window: tuple[int, int], tmp_path: Path) -> None:
        voxels = truth(dtype="uint16")
        low, high = window
        voxels.flat[:8] = [0, 65535, low, high, low + 1, max(low, 1) - 1, (low + high) // 2, min(high + 1, 65535)]
        want = np.array(
            [
                [
                    min(max((2 * 255 * (int(v) - low) + (high - low)) // (2 * (high - low)), 0), 255)
                    for v in voxels.ravel()
                ]
            ],
            np.uint8,
        ).reshape(SHAPE)
        for make in (written.zarr2, written.zarr3, written.n5, written.precomputed):
            source = opened(make(tmp_path / make.__name__, voxels=voxels), intensity_window=window)
            assert source.info.dtype == "uint16"
            part = source.read(source.info.bounds)
            assert part.dtype == np.uint8
            np.testing.assert_array_equal(part, want)
        big_endian = written.zarr2(tmp_path / "be", voxels=voxels.astype(">u2"))
        np.testing.assert_array_equal(opened(big_endian, intensity_window=window).read(Box.of((0, 0, 0), SHAPE)), want)

    def test_by_hand(self, tmp_path: Path) -> None:
        # window 0..510: 255 / 510 is half a grey level per step, so odd values lie exactly between two levels
        voxels = np.array([0, 1, 2, 3, 509, 510, 511, 65535], np.uint16).reshape(1, 1, 8)
        path = tmp_path / "v"
        zarr.create_array(path, shape=voxels.shape, chunks=voxels.shape, dtype="u2", zarr_format=3)[...] = voxels
        got = opened(path, voxel_size_nm=VOXEL_NM, intensity_window=(0, 510)).read(Box.of((0, 0, 0), (1, 1, 8)))
        assert got.ravel().tolist() == [0, 1, 1, 2, 255, 255, 255, 255]

    def test_wanted_for_uint16_and_allowed_for_uint8(self, tmp_path: Path) -> None:
        assert "source.intensity_window" in refusal(written.zarr3(tmp_path / "a", voxels=truth(dtype="uint16")))
        plain, windowed = (
            opened(written.zarr3(tmp_path / n), intensity_window=w) for n, w in (("b", None), ("c", (0, 255)))
        )
        np.testing.assert_array_equal(plain.read(plain.info.bounds), windowed.read(windowed.info.bounds))


class TestRefused:
    @pytest.mark.parametrize(
        ("dtype", "word"),
        [
            ("u4", "segmentations"),
            ("u8", "segmentations"),
            ("i8", "segmentations"),
            ("i1", "source.intensity_window"),
            ("i2", "source.intensity_window"),
            ("f4", "source.intensity_window"),
            ("f8", "source.intensity_window"),
            ("?", "bool"),
            ("c8", "complex64"),
        ],
    )
    @pytest.mark.parametrize("version", [2, 3])
    def test_types(self, dtype: str, word: str, version: int, tmp_path: Path) -> None:
        zarr.create_array(tmp_path / "v", shape=(4, 4, 4), chunks=(4, 4, 4), dtype=dtype, zarr_format=version)
        assert word in refusal(tmp_path / "v", voxel_size_nm=VOXEL_NM)

    def test_structured(self, tmp_path: Path) -> None:
        zarr.create_array(
            tmp_path / "v", shape=(4, 4, 4), chunks=(4, 4, 4), dtype=[("a", "u1"), ("b", "u2")], zarr_format=2
        )
        assert "an array of its own" in refusal(tmp_path / "v", voxel_size_nm=VOXEL_NM)

    @pytest.mark.parametrize("dtype", ["<U4", "|S3", "<M8[ns]", "|O", "|V3", "u1,u2", "(2,2)u1", "nonsense", "u1["])
    def test_no_numbers(self, dtype: str, tmp_path: Path) -> None:
        for make, document, key in ((written.zarr2, ".zarray", "dtype"), (written.zarr3, "zarr.json", "data_type")):
            volume = make(tmp_path / make.__name__)
            edit(volume.path / document, lambda v, key=key: at(v, **{key: dtype}))
            assert "a number type" in refusal(volume)

    @pytest.mark.parametrize("name", ["zfpy", "pickle", "jpeg", "vlen-bytes"])
    def test_zarr2_compressors_and_filters(self, name: str, tmp_path: Path) -> None:
        for key, value in (("compressor", {"id": name}), ("filters", [{"id": name}])):
            volume = written.zarr2(tmp_path / key)
            edit(volume.path / ".zarray", lambda v, key=key, value=value: at(v, **{key: value}))
            message = refusal(volume)
            assert name in message
            assert "Re-encode it with blosc or zstd" in message

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_zarr3_codecs(self, tmp_path: Path) -> None:
        from zarr.codecs import numcodecs as foreign

        volume = written.zarr3(tmp_path / "v")
        edit(volume.path / "zarr.json", lambda v: v["codecs"].append({"name": "numcodecs.zfpy"}))
        assert "numcodecs.zfpy" in refusal(volume)
        written.zarr3(tmp_path / "w", foreign.LZMA(), sharded=True)
        assert "numcodecs.lzma" in refusal(tmp_path / "w", voxel_size_nm=VOXEL_NM)

    @pytest.mark.parametrize(
        "encoding", ["jpegxl", "compressed_segmentation", "compresso", "fpzip", "kempressed", "zfpc", "crackle"]
    )
    def test_precomputed_encodings(self, encoding: str, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")
        edit(volume.path / "info", lambda v: at(v["scales"][0], encoding=encoding))
        message = refusal(volume)
        assert encoding in message
        assert "raw, jpeg, png, jxl" in message

    def test_precomputed_that_is_no_image(self, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")
        edit(volume.path / "info", lambda v: at(v, type="segmentation"))
        assert "a segmentation" in refusal(volume)
        edit(volume.path / "info", lambda v: {"@type": "neuroglancer_annotations_v1"})
        assert "annotations" in refusal(volume)

    def test_other_ome_versions(self, tmp_path: Path) -> None:
        volume = written.ome(tmp_path / "v", "0.4")
        edit(volume.path / ".zattrs", lambda v: at(v["multiscales"][0], version="0.6"))
        assert "OME-Zarr up to 0.5" in refusal(volume)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "nothing is at" in refusal(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        assert "no volume is at" in refusal(tmp_path / "empty")
        (tmp_path / "stack.tif").write_bytes(b"II*\0")
        assert "pipeline.convert" in refusal(tmp_path / "stack.tif")
        (tmp_path / "em.zarr.zip").write_bytes(b"PK")
        assert "Unpack it" in refusal(tmp_path / "em.zarr.zip")

    @pytest.mark.parametrize("make", [written.zarr2, written.zarr3, written.n5, written.precomputed])
    def test_a_metadata_file_is_not_its_folder(self, make: Callable[..., Written], tmp_path: Path) -> None:
        """What is advised works."""
        volume = make(tmp_path / "v")
        advised = Path(refusal(volume.path / volume.metadata[0]).rpartition("lies in, ")[2].rstrip("."))
        assert opened(advised, voxel_size_nm=VOXEL_NM).info.bounds.shape == ZYX.of(SHAPE)

    def test_a_scheme(self) -> None:
        with pytest.raises(SourceError, match="starts with ftp"):
            open_source(SourceConfig(url="ftp://host/volume"))


LIKE = VolumeInfo(
    "file:///em", "zarr3", Box.of((0, 0, 0), SHAPE), VOXEL_NM, (0.0, 0.0, 0.0), "uint8", ZYX.of(written.CHUNK), "0" * 64
)
"""The volume that masks lie over."""


class TestMasks:
    @pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
    def test_whole_numbers(self, dtype: str, tmp_path: Path) -> None:
        values = (truth() % 3 == 0).astype(dtype) * np.array(1, dtype)
        if dtype in ("u4", "i4", "u8", "i8"):
            values = values * (2 ** (8 * np.dtype(dtype).itemsize - 2))
        group = zarr.open_group(tmp_path / "m", mode="w", zarr_format=3)
        group.attrs["ome"] = {"version": "0.5", "multiscales": [written.ome_metadata(levels=1)]}
        group.create_array("s0", shape=SHAPE, chunks=written.CHUNK, dtype=dtype, config={"write_empty_chunks": True})[
            ...
        ] = values
        mask = open_mask(MaskConfig(url=str(tmp_path / "m")), LIKE)
        got = mask.read(mask.info.bounds)
        assert (got.dtype, mask.info.voxel_size_nm) == (np.uint8, VOXEL_NM)
        np.testing.assert_array_equal(got, truth() % 3 == 0)

    @pytest.mark.parametrize("encoding", ["raw", "compressed_segmentation"])
    def test_segmentation(self, encoding: str, tmp_path: Path) -> None:
        labels = (truth() % 4).astype("u8") << 40
        scale = {
            "size": SHAPE[::-1],
            "chunk_size": written.CHUNK[::-1],
            "resolution": VOXEL_NM[::-1],
            "encoding": encoding,
            "key": "s",
        }
        if encoding != "raw":
            scale["compressed_segmentation_block_size"] = [8, 8, 8]
        spec = {
            "driver": "neuroglancer_precomputed",
            "kvstore": {"driver": "file", "path": f"{tmp_path}/"},
            "multiscale_metadata": {"type": "segmentation", "data_type": "uint64", "num_channels": 1},
            "scale_metadata": scale,
            "create": True,
        }
        ts.open(spec).result().write(labels.T[..., None]).result()
        mask = open_mask(MaskConfig(url=str(tmp_path)), LIKE)
        np.testing.assert_array_equal(mask.read(mask.info.bounds), labels != 0)

    def test_refused(self, tmp_path: Path) -> None:
        zarr.create_array(tmp_path / "f", shape=(4, 4, 4), chunks=(4, 4, 4), dtype="f4")
        with pytest.raises(SourceError, match="float32"):
            open_mask(MaskConfig(url=str(tmp_path / "f")), LIKE)

    def test_a_mask_without_voxel_size_spans_the_volume(self, tmp_path: Path) -> None:
        shape = (SHAPE[0], SHAPE[1] // 4, SHAPE[2] // 5)
        zarr.create_array(tmp_path / "n", shape=shape, chunks=shape, dtype="u1")
        mask = open_mask(MaskConfig(url=str(tmp_path / "n")), LIKE)
        assert mask.info.voxel_size_nm == (VOXEL_NM[0], VOXEL_NM[1] * 4, VOXEL_NM[2] * 5)
        assert mask.info.corner_nm == LIKE.corner_nm

    def test_a_coarser_mask_at_the_same_translation_begins_at_the_same_corner(self, tmp_path: Path) -> None:
        like = opened(written.ome(tmp_path / "v", "0.5")).info
        group = zarr.open_group(tmp_path / "m", mode="w", zarr_format=3)
        axes = [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"]
        centre = [c + v / 2 for c, v in zip(like.corner_nm, like.voxel_size_nm, strict=True)]
        transforms = [
            {"type": "scale", "scale": [VOXEL_NM[0], 4 * VOXEL_NM[1], 4 * VOXEL_NM[2]]},
            {"type": "translation", "translation": centre},
        ]
        datasets = [{"path": "0", "coordinateTransformations": transforms}]
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
        group.create_array("0", shape=(20, 10, 12), chunks=(20, 10, 12), dtype="u1")
        assert open_mask(MaskConfig(url=str(tmp_path / "m")), like).info.corner_nm == like.corner_nm

    def test_messages_name_the_mask(self, tmp_path: Path) -> None:
        volume = written.n5(tmp_path / "v")
        with pytest.raises(SourceError, match=r"source\.mask\.mip is 3"):
            open_mask(MaskConfig(url=str(volume.path), mip=3), LIKE)
        with pytest.raises(SourceError, match=r"nothing is at source\.mask\.url"):
            open_mask(MaskConfig(url=str(tmp_path / "absent")), LIKE)


class TestPrecomputedOfOthers:
    """What Neuroglancer reads without a word is read, and keys that it does not know decide nothing."""

    def test_keys_absent_further_or_in_capitals(self, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")

        def change(info: dict[str, Any]) -> None:
            del info["num_channels"], info["type"]
            info.pop("@type", None)
            info |= {"data_type": "UINT8", "mesh": "mesh", "skeletons": None, "generation": {"tool": 1}}
            scale = info["scales"][0]
            scale |= {"encoding": "RAW", "hidden": True, "jxl_effort": 5, "sharding": None, "key": "/4_8_40/"}
            scale["chunk_sizes"] += [[64, 64, 64]]
            info["scales"] += [{"key": "later", "encoding": "of another tool"}]

        edit(volume.path / "info", change)
        source = opened(volume)
        np.testing.assert_array_equal(source.read(source.info.bounds), volume.voxels)

    def test_numbers_as_text(self, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")

        def change(info: dict[str, Any]) -> None:
            for key in ("resolution", "size", "voxel_offset"):
                info["scales"][0][key] = [str(number) for number in info["scales"][0][key]]
            info["scales"][0]["chunk_sizes"] = [[str(n) for n in info["scales"][0]["chunk_sizes"][0]]]

        edit(volume.path / "info", change)
        source = opened(volume)
        assert (source.info.voxel_size_nm, source.info.bounds.start) == (VOXEL_NM, ZYX.of(written.OFFSET))
        np.testing.assert_array_equal(source.read(source.info.bounds), volume.voxels)
        edit(volume.path / "info", lambda v: at(v["scales"][0], resolution=["four", 8, 40]))
        assert 'resolution = ["four", 8, 40]' in refusal(volume)


class TestVoxelOffset:
    """Of precomputed volumes: where voxel 0 of the data lies on the volume's grid, x first."""

    def test_absent_means_zero(self, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")
        edit(volume.path / "info", lambda v: v["scales"][0].pop("voxel_offset") and v)
        info = opened(volume).info
        assert info.bounds == Box.of((0, 0, 0), SHAPE)
        assert info.corner_nm == (0, 0, 0)

    def test_before_the_origin(self, tmp_path: Path) -> None:
        """Chunks are named by negative voxels there, and found."""
        volume = written.precomputed(tmp_path / "v")
        source = opened(volume)
        assert source.info.bounds == Box.at(ZYX.of(written.OFFSET), ZYX.of(SHAPE))
        assert source.info.bounds.start.y < 0
        np.testing.assert_array_equal(source.read(source.info.bounds), volume.voxels)

    @pytest.mark.parametrize("offset", [[0, 0], [0, 0, 0.5], [0, 0, 2**62], ["zero", 0, 0], 0, [True, 0, 0]])
    def test_what_is_no_offset(self, offset: object, tmp_path: Path) -> None:
        volume = written.precomputed(tmp_path / "v")
        edit(volume.path / "info", lambda v: at(v["scales"][0], voxel_offset=offset))
        assert "voxel_offset" in refusal(volume)


def test_a_groups_transformations_come_after_a_levels_own(tmp_path: Path) -> None:
    """A level's translation is scaled by the group's scale: NGFF 0.4, `applied after`."""
    volume = written.ome(tmp_path / "v", "0.4")
    own = [{"type": "scale", "scale": [40, 8, 4]}, {"type": "translation", "translation": [0, 0, 10]}]
    after = [{"type": "scale", "scale": [1, 1, 3]}]

    def change(v: Any) -> None:
        at(v["multiscales"][0], coordinateTransformations=after)
        at(v["multiscales"][0]["datasets"][0], coordinateTransformations=own)

    edit(volume.path / ".zattrs", change)
    info = opened(volume).info
    assert info.voxel_size_nm == (40, 8, 12)
    assert info.corner_nm == (-20, -4, 3 * 10 - 6)
