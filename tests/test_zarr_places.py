"""Which array of a Zarr is meant, and where its voxels lie, by OME metadata of every version and by other tools'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hand_zarr as hand
import numpy as np
import pytest
import tensorstore as ts
import zarr
from hand_zarr import TRUTH
from source_checks import opened, refusal
from source_volumes import VOXEL_NM

from pipeline import run
from pipeline.config.volume import MaskConfig
from pipeline.storage.sources.open import open_mask


def placed(path: Path, corner: tuple[float, float, float], notes: int = 0, **config: Any) -> None:
    """The volume has the voxels of TRUTH, its voxel size, and this lower corner in nm."""
    source = opened(path, **config)
    np.testing.assert_array_equal(source.read(source.info.bounds), TRUTH)
    assert source.info.voxel_size_nm == VOXEL_NM
    assert source.info.corner_nm == corner
    assert len(source.info.notes) == notes


CENTRED = (-20.0, -4.0, -2.0)
"""The corner of a volume whose first voxel's centre is at 0, as OME has it."""


def image2(path: Path, entry: dict[str, Any], voxels: np.ndarray = TRUTH, **more: Any) -> Path:
    """An OME-Zarr on Zarr v2 with one level at "0"."""
    hand.group2(path, {"multiscales": [entry]})
    hand.zarr2(path / "0", voxels, **more)
    return path


class TestOme:
    def test_empty_transformations_are_none(self, tmp_path: Path) -> None:
        placed(image2(tmp_path / "a", hand.ome(coordinateTransformations=[])), CENTRED)
        placed(image2(tmp_path / "b", hand.ome(coordinateTransformations=None)), CENTRED)
        five = hand.group3(tmp_path / "c", {"ome": {"version": "0.5", "multiscales": [hand.ome()]}})
        hand.zarr3(five / "0")
        placed(five, CENTRED)
        scale = [{"type": "scale", "scale": VOXEL_NM}]
        entry = hand.ome(coordinateTransformations=scale, datasets=[{"path": "0", "coordinateTransformations": []}])
        placed(image2(tmp_path / "d", entry), CENTRED)
        second = image2(tmp_path / "e", entry | {"datasets": [{"path": "1"}, {"path": "0/"}]})
        assert "Give source.voxel_size_nm" in refusal(second, mip=1)

    @pytest.mark.parametrize("version", ["0.4", 0.4, None, "0.4-dev", "0.5", 0.5, "0.5.2"])
    def test_spellings_of_a_version(self, version: object, tmp_path: Path) -> None:
        placed(image2(tmp_path / "v", hand.ome(version=version)), CENTRED)

    @pytest.mark.parametrize("version", ["0.1", 0.2, "0.3", None])
    def test_before_0_4(self, version: object, tmp_path: Path) -> None:
        """Up to 0.2 there are no axes and five dimensions, in 0.3 names of axes; a voxel size is nowhere."""
        entry = {"version": version, "datasets": [{"path": "0"}]}
        whole = image2(tmp_path / "a", entry, TRUTH[None, None])
        assert "Give source.voxel_size_nm" in refusal(whole)
        placed(whole, CENTRED, voxel_size_nm=VOXEL_NM)
        named = image2(tmp_path / "b", entry | {"axes": ["x", "z", "y"]}, TRUTH.transpose(2, 0, 1))
        placed(named, CENTRED, voxel_size_nm=VOXEL_NM)
        placed(image2(tmp_path / "c", entry | {"axes": []}), CENTRED, voxel_size_nm=VOXEL_NM)

    def test_without_axes_the_transformations_count_them(self, tmp_path: Path) -> None:
        entry = hand.ome(axes="tczyx") | {"axes": None}
        assert "a scale of [40.0, 8.0, 4.0]" in refusal(image2(tmp_path / "v", entry, TRUTH[None, None]))
        placed(tmp_path / "v", CENTRED, voxel_size_nm=VOXEL_NM)

    @pytest.mark.parametrize("version", ["0.6", "1.0", 2, "latest"])
    def test_later_versions_are_read_by_the_array(self, version: object, tmp_path: Path) -> None:
        path = image2(tmp_path / "v", hand.ome(version=version))
        assert "Name one level's array by source.array" in refusal(path)
        placed(path, (0, 0, 0), array="0", voxel_size_nm=VOXEL_NM, notes=1)

    def test_damaged_transformations_are_read_by_the_array(self, tmp_path: Path) -> None:
        for n, transform in enumerate([{"type": "scale", "scale": None}, {"type": "affine", "affine": []}]):
            entry = hand.ome(datasets=[{"path": "0", "coordinateTransformations": [transform]}])
            path = image2(tmp_path / str(n), entry)
            assert "Name one level's array by source.array" in refusal(path)
            placed(path, (0, 0, 0), array="/0/", voxel_size_nm=VOXEL_NM, notes=1)

    @pytest.mark.parametrize(
        ("unit", "per_nm"),
        [("nm", 1), ("nanometers", 1), ("um", 1e-3), ("µm", 1e-3), ("microns", 1e-3), ("Micron", 1e-3)],
    )
    def test_short_and_plural_units(self, unit: str, per_nm: float, tmp_path: Path) -> None:
        scale = {"type": "scale", "scale": [size * per_nm for size in VOXEL_NM]}
        entry = hand.ome(unit=unit, datasets=[{"path": "0", "coordinateTransformations": [scale]}])
        placed(image2(tmp_path / "v", entry), CENTRED)

    @pytest.mark.parametrize("unit", [None, "", "pixel", 1])
    def test_no_unit(self, unit: Any, tmp_path: Path) -> None:
        entry = hand.ome()
        for axis in entry["axes"]:
            axis["unit"] = unit
        assert "a scale of [40.0, 8.0, 4.0] (z, y, x) without a unit" in refusal(image2(tmp_path / "v", entry))
        placed(tmp_path / "v", CENTRED, voxel_size_nm=VOXEL_NM)

    def test_names_of_dimensions_that_say_nothing(self, tmp_path: Path) -> None:
        for n, names in enumerate((["dim_0", "dim_1", "dim_2"], ["Z", "Y", "X"], ["phony", "y", "x"])):
            placed(image2(tmp_path / str(n), hand.ome(), attributes={"_ARRAY_DIMENSIONS": names}), CENTRED)
        other = image2(tmp_path / "v", hand.ome(), attributes={"_ARRAY_DIMENSIONS": ["x", "y", "z"]})
        assert "the multiscales say ['z', 'y', 'x']" in refusal(other)

    def test_multiscales_of_another_array_are_left_out_by_its_name(self, tmp_path: Path) -> None:
        more = image2(tmp_path / "v", hand.ome(axes="czyx"))
        assert "has 3 axes, the multiscales name ['c', 'z', 'y', 'x']" in refusal(more)
        placed(more, (0, 0, 0), array="0", voxel_size_nm=VOXEL_NM, notes=1)
        turned = image2(tmp_path / "w", hand.ome(axes="zyx"), TRUTH.T, attributes={"axis_names": ["x", "y", "z"]})
        assert "Name the array by source.array" in refusal(turned)
        placed(turned, (0, 0, 0), array="0", voxel_size_nm=VOXEL_NM, notes=1)

    def test_labels_are_no_image(self, tmp_path: Path) -> None:
        path = hand.group2(tmp_path / "v", {"multiscales": [hand.ome()], "image-label": {"version": "0.4"}})
        hand.zarr2(path / "0")
        assert "not of its labels" in refusal(path)
        like = opened(image2(tmp_path / "em", hand.ome())).info
        mask = open_mask(MaskConfig(url=str(path)), like)
        assert mask.read(mask.info.bounds).all()


class TestWhichArray:
    def test_nested_and_with_slashes(self, tmp_path: Path) -> None:
        hand.group2(tmp_path / "v", {})
        hand.zarr2(tmp_path / "v/volumes/raw")
        for name in ("volumes/raw", "/volumes/raw/", "volumes/raw/"):
            placed(tmp_path / "v", (0, 0, 0), array=name, voxel_size_nm=VOXEL_NM)
        placed(tmp_path / "v/volumes/raw", (0, 0, 0), voxel_size_nm=VOXEL_NM)

    def test_without_a_document_of_the_group(self, tmp_path: Path) -> None:
        hand.zarr2(tmp_path / "two/volumes/raw")
        hand.zarr3(tmp_path / "three/volumes/raw")
        for name in ("two", "three"):
            placed(tmp_path / name, (0, 0, 0), array="volumes/raw", voxel_size_nm=VOXEL_NM)

    def test_both_versions_in_one_tree(self, tmp_path: Path) -> None:
        hand.group3(tmp_path / "v", {"ome": {"version": "0.5", "multiscales": [hand.ome()]}})
        hand.zarr2(tmp_path / "v/0")
        placed(tmp_path / "v", CENTRED)
        placed(tmp_path / "v", CENTRED, array="0")
        hand.zarr3(image2(tmp_path / "w", hand.ome()) / "raw")
        placed(tmp_path / "w", (0, 0, 0), array="raw", voxel_size_nm=VOXEL_NM)

    def test_the_nearest_multiscales_that_name_it(self, tmp_path: Path) -> None:
        hand.group2(tmp_path / "v", {})
        image2(tmp_path / "v/volumes/raw", hand.ome())
        placed(tmp_path / "v", CENTRED, array="volumes/raw/0")
        hand.group2(tmp_path / "w", {"multiscales": [hand.ome("scale0/em")]})
        hand.zarr2(tmp_path / "w/scale0/em")
        placed(tmp_path / "w", CENTRED)
        placed(tmp_path / "w", CENTRED, array="scale0/em")

    def test_an_array_by_its_own_url_is_told_of_its_group(self, tmp_path: Path) -> None:
        image2(tmp_path / "v", hand.ome())
        hand.group2(tmp_path / "w", {"multiscales": [hand.ome("scale0/em")]})
        hand.zarr2(tmp_path / "w/scale0/em")
        for path, array in ((tmp_path / "v", "0"), (tmp_path / "w", "scale0/em")):
            message = refusal(path / array)
            assert f"{path} state its place" in message
            assert f"source.array: {array}" in message
            placed(path / array, (0, 0, 0), voxel_size_nm=VOXEL_NM, notes=1)

    @pytest.mark.filterwarnings("ignore:Consolidated metadata")
    @pytest.mark.parametrize("version", [2, 3])
    def test_arrays_of_a_group_are_named(self, version: Any, tmp_path: Path) -> None:
        group = zarr.open_group(tmp_path / "v", mode="w", zarr_format=version)
        group.create_array("x", data=np.arange(26))
        for name in ("volumes/raw", "volumes/labels/ids", "a", "b", "c"):
            group.create_array(name, data=TRUTH)
        message = refusal(tmp_path / "v")
        assert "Its arrays: a, b, c, volumes/labels/ids, volumes/raw and more" in message  # x is no volume
        assert "source.array: a" in message
        with_all = zarr.consolidate_metadata(tmp_path / "v", zarr_format=version)
        assert with_all.metadata.consolidated_metadata is not None
        for name in ("a", "b"):
            for file in (tmp_path / "v" / name).rglob("*"):
                if file.is_file():
                    file.unlink()
        assert "Its arrays: a, b, c" in refusal(tmp_path / "v")  # by the consolidated metadata
        assert "source.array" in refusal(hand.group2(tmp_path / "empty", {}))

    @pytest.mark.parametrize("make", [hand.group2, hand.group3])
    def test_groups_of_images(self, make: Any, tmp_path: Path) -> None:
        for n, (attributes, words) in enumerate(
            [
                ({"bioformats2raw.layout": 3}, ("bioformats2raw", "/0.")),
                ({"plate": {"wells": [{"path": "B/03"}]}}, ("plate", "/B/03/0.")),
                ({"well": {"images": [{"path": "1"}]}}, ("well", "/1.")),
                ({"labels": ["nuclei"]}, ("nuclei", "EM image")),
            ]
        ):
            held = {"ome": {"version": "0.5"} | attributes} if make is hand.group3 else attributes
            message = refusal(make(tmp_path / str(n), held))
            assert all(word in message for word in words), message

    def test_what_is_named_in_a_bioformats2raw_layout_is_read(self, tmp_path: Path) -> None:
        hand.group2(tmp_path / "v", {"bioformats2raw.layout": 3})
        image2(tmp_path / "v/0", hand.ome())
        placed(tmp_path / "v/0", CENTRED)


FUNLIB = {"voxel_size": [40, 8, 4], "offset": [400, 80, 40], "axis_names": ["z", "y", "x"]}


class TestAttributesOfOthers:
    @pytest.mark.parametrize("make", [hand.zarr2, hand.zarr3])
    def test_funlib_states_the_corner(self, make: Any, tmp_path: Path) -> None:
        for n, attributes in enumerate(
            [
                FUNLIB | {"units": ["nm", "nm", "nm"]},
                FUNLIB | {"units": "nanometers"},
                {"resolution": [40.0, 8.0, 4.0], "offset": [400, 80, 40], "unit": "nm"},
                {"resolution": [0.04, 0.008, 0.004], "offset": [0.4, 0.08, 0.04], "units": ["um"] * 3},
            ]
        ):
            path = make(tmp_path / str(n), attributes=attributes)
            placed(path, (400, 80, 40))
            placed(path, (400, 80, 40), voxel_size_nm=VOXEL_NM)
            assert "one voxel size" in refusal(path, voxel_size_nm=(30.0, 8.0, 4.0))

    def test_axes_beside_space(self, tmp_path: Path) -> None:
        attributes = FUNLIB | {"axis_names": ["c^", "z", "y", "x"], "units": ["", "nm", "nm", "nm"]}
        placed(hand.zarr2(tmp_path / "a", TRUTH[None], attributes=attributes), (400, 80, 40))
        xzy = {"voxel_size": [4, 40, 8], "offset": [40, 400, 80], "axis_names": ["x", "z", "y"], "units": ["nm"] * 3}
        placed(hand.zarr2(tmp_path / "b", TRUTH.transpose(2, 0, 1), attributes=xzy), (400, 80, 40))

    def test_without_a_unit(self, tmp_path: Path) -> None:
        path = hand.zarr2(tmp_path / "v", attributes=FUNLIB)
        message = refusal(path)
        assert "voxel_size [40, 8, 4] without a unit of length" in message
        assert "source.voxel_size_nm: [40.0, 8.0, 4.0]" in message
        placed(path, (400, 80, 40), voxel_size_nm=VOXEL_NM)
        in_um = {"resolution": [0.04, 0.008, 0.004], "offset": [0.4, 0.08, 0.04], "units": ["px"] * 3}
        placed(hand.zarr2(tmp_path / "um", attributes=in_um), (400, 80, 40), voxel_size_nm=VOXEL_NM)

    def test_a_position_in_an_unknown_unit_is_told_to_be_dropped(self, tmp_path: Path) -> None:
        for n, attributes in enumerate(
            [
                {"resolution": [8, 8, 8], "offset": [400, 80, 40]},
                {"offset": [400, 80, 40]},
                {"offset": "somewhere"},
                {"offset": [1, 2], "resolution": [40, 8, 4]},
                {"resolution": "300 dpi"},
            ]
        ):
            path = hand.zarr2(tmp_path / str(n), attributes=attributes)
            placed(path, (0, 0, 0), voxel_size_nm=VOXEL_NM, notes=1)
            (note,) = opened(path, voxel_size_nm=VOXEL_NM).info.notes
            assert "not taken" in note
        placed(hand.zarr2(tmp_path / "v", attributes={"offset": [0, 0, 0]}), (0, 0, 0), voxel_size_nm=VOXEL_NM)
        none = {"resolution": [8, 8, 8], "offset": [0, 0, 0]}
        placed(hand.zarr2(tmp_path / "w", attributes=none), (0, 0, 0), voxel_size_nm=VOXEL_NM)

    def test_transform_of_fibsem_tools_states_the_centre(self, tmp_path: Path) -> None:
        transform = {"axes": ["z", "y", "x"], "scale": [40, 8, 4], "translate": [420, 84, 42], "units": ["nm"] * 3}
        placed(hand.zarr2(tmp_path / "a", attributes={"transform": transform}), (400, 80, 40))
        backwards = {key: value[::-1] for key, value in transform.items()} | {"ordering": "F"}
        placed(hand.zarr3(tmp_path / "b", attributes={"transform": backwards}), (400, 80, 40))
        del backwards["ordering"]
        placed(hand.zarr3(tmp_path / "x", TRUTH.T, attributes={"transform": backwards}), (400, 80, 40))
        plain = {"pixelResolution": {"dimensions": [4, 8, 40], "unit": "nm"}, "transform": transform}
        placed(hand.zarr2(tmp_path / "c", attributes=plain), (400, 80, 40))
        bad = {"transform": transform | {"scale": [40, 0, 4]}}
        placed(hand.zarr2(tmp_path / "d", attributes=bad), (0, 0, 0), voxel_size_nm=VOXEL_NM, notes=1)

    def test_pixel_resolution_is_taken_where_its_order_does_not_matter(self, tmp_path: Path) -> None:
        same = {"pixelResolution": {"dimensions": [8, 8, 8], "unit": "nm"}}
        assert opened(hand.zarr2(tmp_path / "a", attributes=same)).info.voxel_size_nm == (8, 8, 8)
        other = {"pixelResolution": {"dimensions": [4, 8, 40], "unit": "nm"}}
        path = hand.zarr2(tmp_path / "b", attributes=other)
        assert "some write x first and some z first" in refusal(path)
        placed(path, (0, 0, 0), voxel_size_nm=VOXEL_NM)

    def test_dimension_units_of_tensorstore(self, tmp_path: Path) -> None:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{tmp_path}/v/"},
            "schema": {"dimension_units": ["40 nm", "0.008um", [4, "nm"]]},
        }
        store = ts.open(spec, create=True, dtype=ts.uint8, shape=TRUTH.shape).result()
        store.write(TRUTH).result()
        placed(tmp_path / "v", (0, 0, 0))
        for units in ([None, "nm", "nm"], ["nm"], "nm", ["40", "8", "4"]):
            path = hand.zarr3(tmp_path / json.dumps(units), attributes={"dimension_units": units})
            assert "Give source.voxel_size_nm" in refusal(path)

    def test_datasets_of_multiscales_with_a_transform(self, tmp_path: Path) -> None:
        """As fibsem-tools writes them in a group beside those of OME, with axes only there."""
        transform = {"axes": ["x", "z", "y"], "scale": [4, 40, 8], "translate": [42, 420, 84], "units": ["nm"] * 3}
        entry = {"name": "em", "datasets": [{"path": "0", "transform": transform}]}
        placed(image2(tmp_path / "v", entry, TRUTH.transpose(2, 0, 1)), (400, 80, 40))

    @pytest.mark.parametrize("rank", [3, 4])
    def test_webknossos_has_x_before_y_and_z(self, rank: int, tmp_path: Path) -> None:
        """Its own file states axes and voxel size; its Zarr v2 arrays have no names."""
        voxels = TRUTH.T[None] if rank == 4 else TRUTH.T
        for n, (scale, mag, entry) in enumerate(
            [
                ({"factor": [4, 8, 40], "unit": "nanometer"}, "1", {"mag": [1, 1, 1]}),
                ([2, 4, 40], "2-2-1", {"mag": [2, 2, 1], "path": "./color/2-2-1"}),
                ({"factor": [0.002, 0.004, 0.02], "unit": "micrometer"}, "2", {}),
            ]
        ):
            path = hand.zarr2(tmp_path / str(n) / "color" / mag, voxels)
            layer = {"name": "color", "category": "color", "dataFormat": "zarr", "mags": [entry] if entry else []}
            held = {"id": {"name": "em"}, "dataLayers": [layer], "scale": scale}
            (tmp_path / str(n) / "datasource-properties.json").write_text(json.dumps(held))
            placed(path, (0, 0, 0))
            placed(tmp_path / str(n), (0, 0, 0), array=f"color/{mag}")
        zyx = {"mag": 1, "axisOrder": {"z": rank - 3, "y": rank - 2, "x": rank - 1}}
        held["dataLayers"][0]["mags"] = [zyx]
        (tmp_path / "0/datasource-properties.json").write_text(json.dumps(held | {"scale": [4, 8, 40]}))
        turned = hand.zarr2(tmp_path / "w" / "color" / "1", TRUTH[None] if rank == 4 else TRUTH)
        (tmp_path / "0/datasource-properties.json").rename(tmp_path / "w/datasource-properties.json")
        placed(turned, (0, 0, 0))

    def test_attributes_of_anybody_else_are_no_matter(self, tmp_path: Path) -> None:
        attributes = {"units": 3, "axis_names": "zyx", "transform": "none", "unit": None, "pixelResolution": [1, 2]}
        placed(hand.zarr2(tmp_path / "v", attributes=attributes), (0, 0, 0), voxel_size_nm=VOXEL_NM)

    def test_multiscales_go_first(self, tmp_path: Path) -> None:
        attributes = FUNLIB | {"units": ["nm"] * 3}
        placed(image2(tmp_path / "a", hand.ome(), attributes=attributes), CENTRED)
        placed(image2(tmp_path / "b", hand.ome(unit=None), attributes=attributes), (400, 80, 40))


def test_what_is_dropped_is_told_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand.zarr2(tmp_path / "lr", attributes={"offset": [400, 80, 40]})
    config = {
        "source": {"url": "lr", "voxel_size_nm": VOXEL_NM},
        "target": {"url": "sr", "chunk_shape": [2, 64, 64], "shard_shape": [2, 128, 128]},
        "network": {"name": "bicubic", "scale": 8},
        "cluster": {"kind": "local", "workers": 1},
    }
    (tmp_path / "volume.yaml").write_text(json.dumps(config))
    assert run.main([str(tmp_path / "volume.yaml"), "--dry-run"]) == 0
    assert "lr: its attribute offset = [400, 80, 40] is not taken" in capsys.readouterr().err
