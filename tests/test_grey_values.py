"""Stored values of every type become grey values by a stated window, the same on every machine; NaN is no value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import source_volumes as written
import zarr
from conftest import run_here, texture, tree, volume_yaml, write_lr
from hypothesis import given
from hypothesis import strategies as st
from source_checks import opened, refusal
from source_volumes import SHAPE, VOXEL_NM, truth

from pipeline import view
from pipeline.base.errors import DamagedChunkError, UserError
from pipeline.base.geometry import Box
from pipeline.config.stage import StageConfig, VolumeConfig
from pipeline.config.volume import FillConfig, SourceConfig
from pipeline.prepare import specification
from pipeline.storage.sources.grey_values import linear_values
from pipeline.storage.sources.open import open_source
from pipeline.training.data import open_volume

LARGEST = 3.0e38


def by_fractions(value: float, low: float, high: float) -> int:
    """The rule in exact numbers: linear, clamped, rounded half up."""
    inside = min(max(Fraction(value), Fraction(low)), Fraction(high))
    return floor((inside - Fraction(low)) * 255 / (Fraction(high) - Fraction(low)) + Fraction(1, 2))


def stored(path: Path, values: np.ndarray, version: int = 3) -> Path:
    """A volume of one row of voxels, by zarr-python."""
    row = values.reshape(1, 1, -1)
    array = zarr.create_array(
        path,
        shape=row.shape,
        chunks=row.shape,
        dtype=row.dtype,
        zarr_format=version,
        config={"write_empty_chunks": True},
    )
    array[...] = row
    return path


def read(path: Path, **config: Any) -> np.ndarray:
    source = open_source(SourceConfig(url=str(path), voxel_size_nm=VOXEL_NM, **config))
    return source.read(source.info.bounds).ravel()


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i2", "u2", ">u2", "i4", ">i4"])
@pytest.mark.parametrize("version", [2, 3])
def test_whole_numbers(dtype: str, version: int, tmp_path: Path) -> None:
    """Every value of the 8 bit types, and of the others those at and around the window's ends."""
    known = np.iinfo(dtype)
    ends = (-100, 27) if known.min < 0 else (3, 250)
    around = {known.min, known.max, known.min + 1, known.max - 1, *(e + d for e in ends for d in (-1, 0, 1))}
    chosen = range(known.min, known.max + 1) if known.bits == 8 else sorted(around | set(range(-60, 60)))
    values = np.array([v for v in chosen if known.min <= v <= known.max], dtype)
    path = stored(tmp_path / "v", values, version)
    wanted = [by_fractions(int(v), *ends) for v in values]
    assert read(path, intensity_window=ends).tolist() == wanted
    assert read(path, intensity_window=ends, invert=True).tolist() == [255 - v for v in wanted]


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8"])
def test_floats_by_hand(dtype: str, tmp_path: Path) -> None:
    """Window 0 .. 1: 0.5 lies on 127.5 and goes up; infinite values are clamped as any other outside."""
    values = np.array([-np.inf, -1, 0, 0.25, 0.5, 0.75, 1, 7, np.inf], dtype)
    path = stored(tmp_path / "v", values)
    assert read(path, intensity_window=(0, 1)).tolist() == [0, 0, 0, 64, 128, 191, 255, 255, 255]
    assert read(path, intensity_window=(-0.5, 0.5)).tolist() == [0, 0, 128, 191, 255, 255, 255, 255, 255]
    assert read(path, intensity_window=(0, 1), invert=True).tolist() == [255, 255, 255, 191, 127, 64, 0, 0, 0]


@given(
    voxels=arrays.arrays(np.float32, (1, 1, 20), elements=st.floats(width=32, allow_nan=False)),
    window=st.tuples(st.floats(-LARGEST, LARGEST), st.floats(-LARGEST, LARGEST)).filter(lambda w: w[0] < w[1]),
)
def test_floats_follow_the_rule(voxels: np.ndarray, window: tuple[float, float]) -> None:
    """Monotone, low is 0, high is 255, and the exact rule but where float64 cannot tell a value from a half."""
    row = np.append(np.sort(voxels.ravel()), np.float32(window)).astype(np.float32)
    got = linear_values(row.reshape(1, 1, -1), *window, invert=False).ravel().astype(int)
    ordered = got[:-2]
    assert (np.diff(ordered) >= 0).all()
    for value, grey in zip(row.tolist(), got.tolist(), strict=True):
        if abs(value) == float("inf"):
            assert grey == (255 if value > 0 else 0)
            continue
        wanted = by_fractions(value, *window)
        if grey != wanted:
            inside = min(max(Fraction(value), Fraction(window[0])), Fraction(window[1]))
            exact = (inside - Fraction(window[0])) * 255 / (Fraction(window[1]) - Fraction(window[0]))
            assert abs(exact + Fraction(1, 2) - max(grey, wanted)) < Fraction(1, 10**9)


@pytest.mark.parametrize("make", [written.zarr2, written.zarr3, written.n5, written.precomputed])
@pytest.mark.parametrize("dtype", ["int8", "int16", "float32"])
def test_in_every_format(make: Callable[..., written.Written], dtype: str, tmp_path: Path) -> None:
    voxels = (truth().astype(np.float64) - 120).astype(dtype)
    source = opened(make(tmp_path / "v", voxels=voxels), intensity_window=(-64, 64))
    assert source.info.dtype == dtype
    wanted = np.array([by_fractions(float(v), -64, 64) for v in voxels.ravel()], np.uint8).reshape(SHAPE)
    np.testing.assert_array_equal(source.read(source.info.bounds), wanted)


def test_nan_is_an_error_or_the_stated_fill(tmp_path: Path) -> None:
    values = np.array([0.0, np.nan, 1.0, np.nan], np.float32)
    path = stored(tmp_path / "v", values)
    source = opened(path, voxel_size_nm=VOXEL_NM, intensity_window=(0, 1))
    with pytest.raises(DamagedChunkError, match=r"NaN at voxel \(0, 0, 1\), 2 of 4 in .*missing_chunks: \{fill: 0\}"):
        source.read(source.info.bounds)
    fill = FillConfig(fill=9)
    assert read(path, intensity_window=(0, 1), missing_chunks=fill).tolist() == [0, 9, 255, 9]
    assert read(path, intensity_window=(0, 1), missing_chunks=fill, invert=True).tolist() == [255, 9, 0, 9]


def test_a_fill_is_a_grey_value_after_window_and_invert(tmp_path: Path) -> None:
    path = stored(tmp_path / "v", np.array([1, 2, 3], np.int16))
    (path / "c/0/0/0").unlink()
    config = {"intensity_window": (0, 10), "invert": True, "missing_chunks": FillConfig(fill=9)}
    assert read(path, **config).tolist() == [9, 9, 9]


@pytest.mark.parametrize(
    ("dtype", "fill", "config", "wanted"),
    [
        ("u1", 0, {}, 0),
        ("u1", 0, {"invert": True}, 255),
        ("i1", -128, {"intensity_window": (-128, 127)}, 0),
        ("u2", 1000, {"intensity_window": (0, 2000)}, 128),
        ("f4", float("nan"), {"intensity_window": (0, 1)}, None),
        ("f4", float("inf"), {"intensity_window": (0, 1), "invert": True}, 0),
    ],
)
@pytest.mark.parametrize("version", [2, 3])
def test_what_the_volumes_own_fill_value_is_read_as(
    dtype: str, fill: float, config: dict[str, Any], wanted: int | None, version: int, tmp_path: Path
) -> None:
    zarr.create_array(
        tmp_path / "v", shape=(2, 2, 2), chunks=(2, 2, 2), dtype=dtype, fill_value=fill, zarr_format=version
    )
    assert opened(tmp_path / "v", voxel_size_nm=VOXEL_NM, **config).info.unstored == wanted


class TestWindowWanted:
    """Where a window is missing, the message has one to paste, and it works."""

    @pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "i4", "f2", "f4", "f8"])
    def test_what_it_proposes_works(self, dtype: str, tmp_path: Path) -> None:
        path = tmp_path / "v"
        voxels = np.random.default_rng(0).normal(50, 8, (20, 40, 50)).astype(dtype)
        zarr.create_array(path, shape=voxels.shape, chunks=(8, 16, 16), dtype=dtype, zarr_format=3)[...] = voxels
        message = refusal(path, voxel_size_nm=VOXEL_NM)
        line = message.rpartition("source.intensity_window: ")[2].rstrip(".")
        low, high = json.loads(line)
        assert 20 < low < 40 < 60 < high < 80
        grey = read(path, intensity_window=(low, high))
        assert 100 < grey.mean() < 155
        assert len(np.unique(grey)) > 20

    def test_small_floats_are_written_as_yaml_reads_them(self, tmp_path: Path) -> None:
        import yaml

        path = stored(tmp_path / "v", np.linspace(0, 5e-7, 1000).astype(np.float32))
        proposed = refusal(path, voxel_size_nm=VOXEL_NM).rpartition("source.intensity_window: ")[2].rstrip(".")
        assert all(isinstance(v, int | float) for v in yaml.safe_load(proposed)), proposed

    def test_nothing_to_propose(self, tmp_path: Path) -> None:
        """Nothing stored, one value only, nothing but NaN: the message comes all the same."""
        zarr.create_array(tmp_path / "a", shape=(4, 4, 4), chunks=(4, 4, 4), dtype="i2", zarr_format=3)
        stored(tmp_path / "b", np.full(9, 7, np.uint16))
        stored(tmp_path / "c", np.full(9, np.nan, np.float32))
        for name in "abc":
            assert "[low, high]" in refusal(tmp_path / name, voxel_size_nm=VOXEL_NM)
        assert "7 to 7" in refusal(tmp_path / "b", voxel_size_nm=VOXEL_NM)

    @pytest.mark.parametrize(
        ("dtype", "window", "wanted"),
        [
            ("i1", (-129, 5), "-128 to 127"),
            ("u1", (0, 256), "0 to 255"),
            ("u2", (-1, 5), "0 to 65535"),
            ("i2", (0.5, 5), "-32768 to 32767"),
        ],
    )
    def test_a_window_that_the_type_lacks(
        self, dtype: str, window: tuple[float, float], wanted: str, tmp_path: Path
    ) -> None:
        path = stored(tmp_path / "v", np.arange(9).astype(dtype))
        assert wanted in refusal(path, voxel_size_nm=VOXEL_NM, intensity_window=window)

    @pytest.mark.parametrize("dtype", ["u4", "u8", "i8"])
    def test_what_is_advised_for_wide_integers_works(self, dtype: str, tmp_path: Path) -> None:
        values = np.arange(0, 200, 10).astype(dtype)
        path = stored(tmp_path / "v", values)
        message = refusal(path, voxel_size_nm=VOXEL_NM, intensity_window=(0, 190))
        assert "int32 or float64" in message
        for again in ("int32", "float64"):
            got = read(stored(tmp_path / again, values.astype(again)), intensity_window=(0, 190))
            assert (got[0], got[-1]) == (0, 255)


def test_whole_floats_in_a_window_are_the_same_plan() -> None:
    as_floats = SourceConfig.model_validate({"url": "x", "intensity_window": [1200.0, 41000.0]})
    as_ints = SourceConfig.model_validate({"url": "x", "intensity_window": [1200, 41000]})
    assert as_floats == as_ints
    assert json.dumps(as_floats.intensity_window) == json.dumps(as_ints.intensity_window) == "[1200, 41000]"
    assert specification.digest({"w": as_floats.intensity_window}) == specification.digest({"w": [1200, 41000]})


@pytest.mark.parametrize("dtype", ["float32", "int16", "float64"])
def test_a_run_of_such_a_volume(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes what a run of the grey values would write, the plan says how they came about, and the viewer shows
    them so; what Neuroglancer lacks is told.
    """
    grey = texture((4, 32, 32))
    write_lr(tmp_path / "plain.zarr", grey)
    write_lr(tmp_path / "other.zarr", (1000 - 2 * grey.astype(np.int32)).astype(dtype))
    window = {"source__intensity_window": [490, 1000], "source__invert": True}
    run_here(volume_yaml(tmp_path / "v.yaml", "plain.zarr", "plain/sr"))
    path = volume_yaml(tmp_path / "w.yaml", "other.zarr", "other/sr", **window)
    run_here(path)
    one, other = (tree(tmp_path / name / "sr") for name in ("plain", "other"))
    assert {key for key in one | other if one.get(key) != other.get(key)} == {"zarr.json"}
    recorded = json.loads((tmp_path / "other/sr/zarr.json").read_text())["attributes"]["emsr"]["source"]
    assert (recorded["intensity_window"], recorded["invert"]) == ([490, 1000], True)
    assert "invert" not in (tmp_path / "plain/sr.emsr/plan.json").read_text(), "plans of before it was a key have none"
    assert view.main([str(path), "--state"]) == 0
    shown = capsys.readouterr()
    lr = json.loads(shown.out)["layers"][0]
    assert lr["shaderControls"] == {"contrast": {"range": [490, 1000]}}
    assert "emitGrayscale(1.0 - contrast())" in lr["shader"]
    assert re.findall("does not read (.*), so", shown.err) == ["voxels of float64"] * (dtype == "float64")


def test_training_reads_it_too(tmp_path: Path) -> None:
    """HR and given LR through window and invert; a checkpoint of before `invert` was a key has the same settings."""
    grey = texture((3, 64, 64))
    write_lr(tmp_path / "hr.zarr", 1 - grey.astype(np.float32) / 255)
    config = VolumeConfig(url=str(tmp_path / "hr.zarr"), intensity_window=(0, 1), invert=True)
    found = open_volume(config, 8, 1, 32).volume.hr(slice(0, 3), slice(0, 64), slice(0, 64))
    np.testing.assert_array_equal(found, grey)
    (tmp_path / "hr.zarr/0/c/0/1/1").unlink()
    with pytest.raises(UserError, match="state missing_chunks beside its url"):
        open_volume(config, 8, 1, 32)
    with pytest.raises(UserError, match="state missing_chunks beside its url"):
        open_volume(config, 8, 1, 32, budget=0)
    filled = config.model_copy(update={"missing_chunks": FillConfig(fill=9)})
    found = open_volume(filled, 8, 1, 32).volume.hr(slice(0, 3), slice(0, 64), slice(0, 64))
    assert (found[:, 16:32, 16:32] == 9).all()
    for entry, named in ((config, ["invert"]), (config.model_copy(update={"invert": False}), [])):
        data = {"train": [entry], "licence": "CC0", "crop": 32}
        stage = {"stage": "flow", "output": tmp_path, "data": data, "network": {"scale": 8}, "steps": 1}
        settings = StageConfig.model_validate(stage).settings({})
        assert [key.rpartition(".")[2] for key in settings if key.endswith(("invert", "missing_chunks"))] == named


def test_half_a_box_is_the_half_of_the_box(tmp_path: Path) -> None:
    """Law 1 for types that are computed section by section."""
    voxels = np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)
    source = opened(written.zarr3(tmp_path / "v", voxels=voxels), intensity_window=(-2.5, 2.5))
    whole, part = source.read(source.info.bounds), Box.of((3, 7, 11), (9, 30, 41))
    np.testing.assert_array_equal(source.read(part), whole[part.slices()])
