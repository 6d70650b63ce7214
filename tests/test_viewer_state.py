"""Layers coincide: by the volumes' own metadata where that suffices, by an explicit transform everywhere else."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import pytest

from pipeline.base.geometry import ZYX
from pipeline.plan.target_spec import LevelSpec, TargetSpec
from pipeline.storage.targets.open import StoredTarget
from pipeline.viewer.data_source import Native, read_native
from pipeline.viewer.state import PUBLIC, Layer, Mark, coincides, public_link, transform, viewer_state

Docs = dict[str, Any]


def native(docs: Docs, **options: Any) -> Native:
    found = read_native(lambda key: json.dumps(docs[key]).encode() if key in docs else None, **options)
    assert found is not None
    return found


def ome(
    levels: list[tuple[list[float], list[float]]],
    unit: str | None = "nanometer",
    version: str = "0.5",
    axes: str = "zyx",
    whole: Any = None,
) -> Docs:
    steps = [[{"type": "scale", "scale": s}, {"type": "translation", "translation": t}] for s, t in levels]
    datasets = [{"path": f"s{k}", "coordinateTransformations": step} for k, step in enumerate(steps)]
    multiscale: Docs = {
        "axes": [{"name": a, "type": "space"} | ({"unit": unit} if unit else {}) for a in axes],
        "datasets": datasets,
    }
    if whole:
        multiscale["coordinateTransformations"] = whole
    docs: Docs = {
        "zarr.json": {"node_type": "group", "attributes": {"ome": {"version": version, "multiscales": [multiscale]}}}
    }
    return docs | {
        f"s{k}/zarr.json": {"node_type": "array", "shape": [8, 64 >> k, 96 >> k]} for k in range(len(levels))
    }


def first_voxel(layer: Layer) -> tuple[list[float], list[float]]:
    """Corner and voxel size (nm; z, y, x) of the level's first voxel as Neuroglancer will compute them from the state.

    Its rule: a matrix acts on lengths (voxel x input scale), the last column counts voxels of the output scale.
    """
    entry = viewer_state([layer], layer, "")["layers"][0]
    spelt = entry["source"].get("transform")
    if spelt is None:
        assert layer.native.voxel_nm is not None
        scales, shift, names = (
            list(layer.native.voxel_nm),
            [0.0, 0.0, 0.0],
            dict(zip(layer.native.names, "zyx", strict=True)),
        )
    else:
        scales = [spelt["inputDimensions"][name][0] * 1e9 for name in layer.native.names]
        shift = [
            row[3] * spelt["outputDimensions"][name][0] * 1e9
            for row, name in zip(spelt["matrix"], spelt["outputDimensions"], strict=True)
        ]
        names = dict(zip(layer.native.names, spelt["outputDimensions"], strict=True))
        assert [row[:3] for row in spelt["matrix"]] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert list(names.values()) == ["z", "y", "x"]
    corner = [start * scale + s for start, scale, s in zip(layer.native.start, scales, shift, strict=True)]
    return corner, [step * scale for step, scale in zip(layer.native.step, scales, strict=True)]


def check(layer: Layer, explicit: bool) -> None:
    corner, voxel = first_voxel(layer)
    assert coincides(layer) is not explicit
    assert corner == pytest.approx(layer.corner_nm, abs=1e-6)
    assert voxel == pytest.approx(layer.voxel_nm, rel=1e-9)


def test_ome_translation_is_a_voxels_centre() -> None:
    found = native(ome([([40, 4, 4], [1020, 2, -6])]))
    assert (found.kind, found.path, found.names, found.voxel_nm) == ("zarr3", "", ("z", "y", "x"), (40, 4, 4))
    assert found.corner_nm == (1000, 0, -8)
    check(Layer("SR", "u", found, (40, 4, 4), (1000, 0, -8)), explicit=False)


def test_ome_without_translation_starts_half_a_voxel_low() -> None:
    assert native(ome([([40, 4, 4], [0, 0, 0])])).corner_nm == (-20, -2, -2)


def test_ome_units_and_the_multiscales_own_transformations() -> None:
    found = native(
        ome([([40, 4, 4], [0, 0, 0])], unit="micrometer", whole=[{"type": "scale", "scale": [1e-3, 2e-3, 1e-3]}])
    )
    assert found.voxel_nm == pytest.approx((40, 8, 4))
    assert found.corner_nm == pytest.approx((-20, -4, -2))


def test_a_coarser_level_is_counted_in_voxels_of_the_finest() -> None:
    """Level 1 of 8 nm with its centre at 3 nm: corner -1 nm, which is a quarter of a 4 nm voxel below 0."""
    found = native(ome([([40, 4, 4], [20, 2, 2]), ([40, 8, 8], [20, 3, 3])]), level=1)
    assert (found.step, found.start, found.shape) == ((1, 2, 2), (0, -0.25, -0.25), ZYX(8, 32, 48))
    assert found.level_voxel_nm == (40, 8, 8)
    check(Layer("LR", "u", found, (40, 8, 8), (0, -1, -1)), explicit=False)


def test_ome_without_units_is_placed_by_volume_yaml() -> None:
    found = native(ome([([1, 1, 1], [0, 0, 0]), ([1, 2, 2], [0, 0.5, 0.5])], unit=None), level=1)
    assert found.voxel_nm is None
    check(Layer("LR", "u", found, (45, 74, 74), (10, 20, 30)), explicit=True)


def test_ome_axes_of_other_names() -> None:
    found = native(ome([([40, 4, 4], [20, 2, 2])], axes="ZYX"))
    check(Layer("LR", "u", found, (40, 4, 4), (0, 0, 0)), explicit=True)
    assert set(transform(Layer("LR", "u", found, (40, 4, 4), (0, 0, 0)))["inputDimensions"]) == set("ZYX")


def test_ome_of_zarr_2_with_channel_axes() -> None:
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "nanometer"} for n in "zyx")]
    steps = [{"type": "scale", "scale": [1, 40, 4, 4]}]
    docs: Docs = {
        ".zattrs": {
            "multiscales": [
                {"version": "0.4", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}
            ]
        }
    }
    found = native(docs | {"0/.zarray": {"shape": [1, 8, 16, 32]}})
    assert (found.kind, found.shape, found.corner_nm) == ("zarr2", ZYX(8, 16, 32), (-20, -2, -2))


def test_ome_of_a_version_that_neuroglancer_skips_opens_the_level_alone() -> None:
    found = native(ome([([40, 4, 4], [0, 0, 0]), ([40, 8, 8], [0, 0, 0])], version="0.3"), level=1)
    assert (found.path, found.names, found.voxel_nm) == ("s1", ("dim_0", "dim_1", "dim_2"), None)
    layer = Layer("LR", "https://host/v", found, (40, 8, 8), (-20, -4, -4))
    check(layer, explicit=True)
    assert layer.source_url == "zarr3://https://host/v/s1"


@pytest.mark.parametrize("unit", ["nm", "nanometre"])
def test_ome_of_a_unit_that_neuroglancer_refuses_opens_the_level_alone(unit: str) -> None:
    found = native(ome([([40, 4, 4], [20, 2, 2])], unit=unit))
    assert (found.path, found.voxel_nm) == ("s0", None)


def test_plain_arrays() -> None:
    v2 = native({"vol/raw/.zarray": {"shape": [8, 16, 32]}}, array="vol/raw")
    assert (v2.kind, v2.path, v2.names) == ("zarr2", "vol/raw", ("d0", "d1", "d2"))
    named = native({".zarray": {"shape": [8, 16, 32]}, ".zattrs": {"_ARRAY_DIMENSIONS": ["z", "y", "x"]}})
    v3 = native(
        {
            "zarr.json": {
                "node_type": "array",
                "shape": [1, 8, 16, 32],
                "dimension_names": ["t", None, "y", "x"],
                "attributes": {},
            }
        }
    )
    assert (v3.names, v3.shape) == (("dim_1", "y", "x"), ZYX(8, 16, 32))
    for found in (v2, named, v3):
        check(Layer("LR", "u", found, (45, 37, 37), (0, 0, 0)), explicit=True)


def test_precomputed_counts_from_its_offset() -> None:
    scales = [
        {"resolution": [4, 4, 40], "size": [96, 64, 8], "voxel_offset": [100, 200, 30]},
        {"resolution": [8, 8, 40], "size": [48, 32, 8], "voxel_offset": [50, 100, 30]},
    ]
    fine, coarse = (native({"info": {"scales": scales}}, level=k) for k in (0, 1))
    assert fine.corner_nm == coarse.corner_nm == (1200, 800, 400)
    assert (coarse.step, coarse.shape, coarse.level_voxel_nm) == ((1, 2, 2), ZYX(8, 32, 48), (40, 8, 8))
    check(Layer("LR", "u", coarse, (40, 8, 8), (1200, 800, 400)), explicit=False)
    check(Layer("SR", "u", fine, (40, 4, 4), (1180, 800, 400)), explicit=True)


def test_n5_levels_units_and_inheritance() -> None:
    pyramid = {
        "attributes.json": {
            "pixelResolution": {"unit": "um", "dimensions": [0.004, 0.004, 0.04]},
            "scales": [[1, 1, 1], [2, 2, 1]],
        },
        "s0/attributes.json": {"dimensions": [96, 64, 8]},
        "s1/attributes.json": {"dimensions": [48, 32, 8]},
    }
    found = native(pyramid, level=1)
    assert (found.path, found.names, found.step, found.shape) == ("", ("z", "y", "x"), (1, 2, 2), ZYX(8, 32, 48))
    check(Layer("LR", "u", found, (40, 8, 8), (0, 0, 0)), explicit=False)
    inherited = native(pyramid | {"attributes.json": {"resolution": [4, 4, 40]}}, level=1)
    assert (inherited.path, inherited.voxel_nm) == ("s1", (40, 4, 4))
    nested = native(
        {"a/attributes.json": {"resolution": [4, 4, 40]}, "a/b/attributes.json": {"dimensions": [96, 64, 8]}},
        array="a/b",
    )
    assert (nested.path, nested.voxel_nm, nested.shape) == ("a/b", (40, 4, 4), ZYX(8, 64, 96))
    rootless = native(
        {"s1/attributes.json": {"dimensions": [48, 32, 8], "resolution": [4, 4, 40], "downsamplingFactors": [2, 2, 1]}},
        level=1,
    )
    assert (rootless.path, rootless.step, rootless.level_voxel_nm) == ("s1", (1, 2, 2), (40, 8, 8))
    turned = native({"attributes.json": {"dimensions": [8, 64, 96], "axes": ["z", "y", "x"], "resolution": [40, 4, 4]}})
    assert (turned.shape, turned.names, turned.voxel_nm) == (ZYX(8, 64, 96), ("z", "y", "x"), (40, 4, 4))
    bare = native({"attributes.json": {"dimensions": [96, 64, 8]}})
    check(Layer("LR", "u", bare, (45, 37, 37), (0, 0, 0)), explicit=True)


_ZARRAY = {"shape": [16, 16, 32], "chunks": [8, 8, 8], "order": "C", "fill_value": None, "compressor": None}


@pytest.mark.parametrize(
    ("docs", "words"),
    [
        ({".zarray": {"shape": [8, 16, 32], "compressor": {"id": "bz2"}}}, "compression bz2"),
        ({".zarray": _ZARRAY | {"compressor": {"id": "zstd", "level": 1}}}, None),
        ({".zarray": _ZARRAY | {"compressor": {"id": "zstd"}}}, "zstd with level None"),
        (
            {".zarray": _ZARRAY | {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": True}}},
            "blosc with shuffle True",
        ),
        ({".zarray": _ZARRAY | {"filters": [{"id": "delta"}]}}, "filters"),
        ({".zarray": _ZARRAY | {"fill_value": "0"}}, "the fill_value 0"),
        ({".zarray": {"shape": [8, 16, 32], "chunks": [8, 8, 8], "compressor": None}}, "a .zarray without order"),
        ({".zarray": _ZARRAY, "1/1/2": {}}, 'chunks named with "/" where .zarray says "."'),
        ({".zarray": _ZARRAY, "0/0/0": {}, "0.0.0": {}}, None),
        ({"zarr.json": {"shape": [8, 16, 32], "codecs": [{"name": "numcodecs.lz4"}]}}, "the codec numcodecs.lz4"),
        ({"zarr.json": {"shape": [8, 16, 32], "codecs": ["bytes"]}}, "the codec bytes"),
        ({"zarr.json": {"shape": [8, 16, 32], "data_type": {"name": "uint8"}}}, "a data_type that is no text"),
        ({"zarr.json": {"shape": [8, 16, 32], "codecs": [{"name": "bytes"}], "fill_value": 0}}, None),
        ({"zarr.json": {"shape": [8, 16, 32], "data_type": "float32", "fill_value": 0.5}}, None),
        ({"zarr.json": {"shape": [8, 16, 32], "data_type": "float32", "fill_value": "NaN"}}, None),
        ({"attributes.json": {"dimensions": [9, 9, 9], "compression": {"type": "xz"}}}, "compression xz"),
        (
            {"attributes.json": {"dimensions": [9, 9, 9], "pixelResolution": [4, 4, 40]}},
            "a pixelResolution that is a list",
        ),
        (
            {"attributes.json": {"dimensions": [9, 9, 9], "resolution": [4, 4, 40], "units": ["nanometer"] * 3}},
            "the unit nanometer",
        ),
        ({"attributes.json": {"dimensions": [9, 9, 9], "compression": "gzip"}}, "a compression that is text"),
        (
            {"attributes.json": {"dimensions": [9, 9, 9], "resolution": [4, 4, 40], "units": "nm"}},
            "units that are text",
        ),
        ({"attributes.json": {"dimensions": [9, 9, 9], "axes": [{"name": "x"}]}}, "axes that are no words"),
        ({"info": {"scales": [{"resolution": ["4", "4", "40"], "size": ["9", 9, 9], "encoding": "jxl"}]}}, None),
    ],
)
def test_what_neuroglancer_cannot_show_is_said(docs: Docs, words: str | None) -> None:
    assert native(docs).unreadable == words


def test_axes_that_neuroglancer_does_not_see_are_put_in_order() -> None:
    """As of OME-Zarr 0.3 and of other tools' attributes: the source says which axis is which."""
    array = {"shape": [32, 8, 16]}
    multiscale = {"version": "0.3", "axes": ["x", "z", "y"], "datasets": [{"path": "0"}]}
    old = native({".zattrs": {"multiscales": [multiscale]}, "0/.zarray": array}, zyx=(1, 2, 0))
    assert (old.path, old.names, old.shape) == ("0", ("d1", "d2", "d0"), ZYX(8, 16, 32))
    labs = native({".zarray": array, ".zattrs": {"axis_names": ["x", "z", "y"]}}, zyx=(1, 2, 0))
    assert (labs.names, labs.shape) == (("d1", "d2", "d0"), ZYX(8, 16, 32))
    mixed = native({"zarr.json": {"attributes": {"multiscales": [multiscale]}}, "0/.zarray": array})
    assert (mixed.kind, mixed.path) == ("zarr2", "0")


def test_the_prefix_of_the_url_decides_and_absence_is_told() -> None:
    docs = {"info": {"scales": [{"resolution": [4, 4, 40], "size": [9, 9, 9]}]}, ".zarray": {"shape": [8, 16, 32]}}
    assert native(docs, kind="precomputed").kind == "precomputed"
    assert native(docs, kind="zarr").kind == "zarr2"
    assert read_native(lambda key: None) is None
    assert read_native(lambda key: None, "n5", 3) is None


@pytest.mark.parametrize(
    "docs",
    [
        {"zarr.json": []},
        {"zarr.json": {"attributes": {}}},
        {"info": {"scales": []}},
        {"info": {"scales": [{}]}},
        {".zarray": {"shape": 7}},
    ],
)
def test_damaged_metadata_raises_what_the_command_catches(docs: Docs) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, IndexError)):
        native(docs)


@pytest.mark.parametrize("corner", [(0.0, 0.0, 0.0), (-22.5, -18.5, -18.5), (990.0, 18.5 * 7, -18.5)])
@pytest.mark.parametrize("form", ["ome-zarr", "precomputed"])
def test_our_targets(form: str, corner: tuple[float, float, float]) -> None:
    """OME targets are right by themselves. Precomputed ones count whole voxels.

    Where the corner is not on that grid the state says so.
    """
    encoding = {"ome-zarr": "blosc-zstd", "precomputed": "raw"}[form]
    sr, lr = (
        LevelSpec(ZYX(8, 512, 512), ZYX(8, 64, 64), ZYX(8, 64, 64)),
        LevelSpec(ZYX(8, 64, 64), ZYX(8, 64, 64), ZYX(8, 64, 64)),
    )
    spec = TargetSpec("file:///t", form, encoding, 8, (45.0, 37 / 8, 37 / 8), corner, (sr,), lr)
    docs = {key: json.loads(value) for key, value in StoredTarget(spec).metadata().items()}
    found = native(docs)
    inside = native(
        {key.removeprefix("fidelity/"): value for key, value in docs.items() if key.startswith("fidelity/")}
    )
    assert (found.shape, inside.shape) == (ZYX(8, 512, 512), ZYX(8, 64, 64))
    check(Layer("SR", "u", found, (45, 37 / 8, 37 / 8), corner), explicit=form == "precomputed" and corner[0] == -22.5)
    check(Layer("fidelity", "u", inside, (45, 37, 37), corner), explicit=form == "precomputed" and corner[0] != 0)


def test_the_whole_state() -> None:
    """8 sections of 64 x 96 LR voxels of 40 nm at (1000, 0, -8): the middle of section 4 of the 5 nm target.

    96 * 8 voxels lie on 600 pixels.
    """
    corner = (1000.0, 0.0, -8.0)
    lr = Layer(
        "LR",
        "http://127.0.0.1:1/s/LR",
        native(ome([([40, 40, 40], [1020, 20, 12])])),
        (40, 40, 40),
        corner,
        contrast=(100, 900),
    )
    sr = Layer(
        "SR",
        "s3://bucket/sr",
        Native("precomputed", "", ("z", "y", "x"), (40, 5, 5), (25, 0, -2), (1, 1, 1), ZYX(8, 512, 768)),
        (40, 5, 5),
        corner,
    )
    fidelity = Layer("fidelity", "s3://bucket/sr/fidelity", lr.native, (40, 40, 40), corner, heat=True, visible=False)
    state = viewer_state([lr, sr, fidelity], sr, "volume.yaml")
    assert list(state["dimensions"].items()) == [("x", [5e-9, "m"]), ("y", [5e-9, "m"]), ("z", [4e-8, "m"])]
    assert state["position"] == [-8 / 5 + 384, 256, 1000 / 40 + 4.5]
    assert state["crossSectionScale"] == pytest.approx(768 / 600)
    assert state["layout"] == "xy"
    assert [(entry["name"], entry["visible"]) for entry in state["layers"]] == [
        ("LR", True),
        ("SR", True),
        ("fidelity", False),
    ]
    assert [entry["source"]["url"] for entry in state["layers"]] == [
        "zarr3://http://127.0.0.1:1/s/LR",
        "precomputed://s3://bucket/sr",
        "zarr3://s3://bucket/sr/fidelity",
    ]
    assert state["layers"][0]["shaderControls"] == {"contrast": {"range": [100, 900]}}
    assert "transform" not in state["layers"][0]["source"]
    assert [row[3] for row in state["layers"][1]["source"]["transform"]["matrix"]] == pytest.approx([0, 0, 0.4])
    assert all("#uicontrol invlerp contrast" in entry["shader"] for entry in state["layers"])


def test_quarantined_tasks_are_boxes_in_a_layer_of_their_own() -> None:
    """Corners in voxels of the focus, x first: 1000 nm and 1080 nm are sections 25 and 27 of 40 nm.

    -8 nm is 1.6 voxels of 5 nm below 0.
    """
    sr = Layer(
        "SR",
        "u",
        Native("zarr3", "", ("z", "y", "x"), (40, 5, 5), (25, 0, 0), (1, 1, 1), ZYX(8, 512, 768)),
        (40, 5, 5),
        (1000, 0, -8),
    )
    assert [layer["name"] for layer in viewer_state([sr], sr, "")["layers"]] == ["SR"]
    layer = viewer_state([sr], sr, "", [Mark("task 7", (1000, 0, -8), (1080, 640, 632), "why")])["layers"][1]
    assert (layer["type"], layer["name"], layer["source"]["url"]) == (
        "annotation",
        "quarantined",
        "local://annotations",
    )
    assert layer["source"]["transform"]["outputDimensions"] == {"x": [5e-9, "m"], "y": [5e-9, "m"], "z": [4e-8, "m"]}
    (box,) = layer["annotations"]
    assert (box["type"], box["id"], box["description"]) == ("axis_aligned_bounding_box", "task 7", "why")
    assert box["pointA"] == pytest.approx([-1.6, 0, 25])
    assert box["pointB"] == pytest.approx([126.4, 128, 27])


def test_the_link_carries_the_state() -> None:
    link = public_link({"title": "a b #|&", "layers": []})
    assert link.startswith(f"{PUBLIC}#!")
    assert " " not in link
    assert "|" not in link
    assert json.loads(unquote(link.partition("#!")[2])) == {"title": "a b #|&", "layers": []}
