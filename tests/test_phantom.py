"""The examples' data: the phantom is the same every time and has the statistics of EM sections; LR follows from HR."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import REPOSITORY, SHARED, tree
from ome_zarr_models.v05.image import Image as NgffImage

from models.degrade import degrade
from pipeline.base.errors import TargetError, UserError
from pipeline.config.volume import load

sys.path.insert(0, str(REPOSITORY / "examples"))
import fetch_drosophila_vnc
import make_phantom


@pytest.fixture(scope="module")
def hr() -> np.ndarray:
    return make_phantom.phantom((4, 384, 384), 3)


def test_deterministic() -> None:
    digests = {hashlib.sha256(make_phantom.phantom((2, 96, 128), 5).tobytes()).hexdigest() for _ in range(2)}
    assert len(digests) == 1
    assert not np.array_equal(make_phantom.phantom((2, 96, 128), 6), make_phantom.phantom((2, 96, 128), 5))


def test_shapes_that_are_no_whole_blocks() -> None:
    assert make_phantom.phantom((1, 40, 56), 1).shape == (1, 40, 56)


def test_looks_like_em(hr: np.ndarray) -> None:
    assert hr.dtype == np.uint8
    assert 100 < hr.mean() < 160
    assert 30 < hr.std() < 60
    assert (hr == 0).mean() + (hr == 255).mean() < 0.01
    dark, light = np.percentile(hr, 4), np.percentile(hr, 60)
    assert light - dark > 60, "membranes stand out from cytoplasm"
    neighbours = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairwise(hr)]
    assert 0.3 < min(neighbours) <= max(neighbours) < 0.85
    assert len({round(float(section.mean()), 3) for section in hr}) == len(hr), "every section has its own light"


def test_sections_drift_by_several_voxels() -> None:
    drift = make_phantom.Tissue.grow((16, 64, 64), make_phantom.SEED).drift
    steps = np.hypot(*np.diff(drift, axis=0).T)
    assert 1.5 < np.median(steps) < 8
    assert steps.max() < 20


def test_lr_is_the_degraded_hr_at_the_same_place(tmp_path: Path) -> None:
    shape = (3, 64, 96)
    assert make_phantom.make(tmp_path, shape)
    hr, lr = (zarr.open_group(tmp_path / name, mode="r") for name in ("hr.zarr", "lr.zarr"))
    assert np.array_equal(hr["0"][:], make_phantom.phantom(shape))
    assert np.array_equal(lr["0"][:], [degrade(section, make_phantom.SCALE) for section in hr["0"][:]])
    assert lr["0"].shape == (3, 8, 12)
    corners, ends = [], []
    for group in (hr, lr):
        scale, translation = (
            NgffImage.from_zarr(group).attributes.ome.multiscales[0].datasets[0].coordinateTransformations
        )
        size = np.array(scale.scale)
        corners.append(np.array(translation.translation) - size / 2)
        ends.append(corners[-1] + size * group["0"].shape)
    assert (corners[0] == corners[1]).all()
    assert (ends[0] == ends[1]).all()


def test_degrade_by_hand() -> None:
    flat = np.full((32, 32), 77, np.uint8)
    assert (degrade(flat, 8) == 77).all()
    half = np.zeros((64, 64), np.uint8)
    half[:, 32:] = 200
    reduced = degrade(half, 8)
    assert (reduced[:, :2] == 0).all()
    assert (reduced[:, 6:] == 200).all()
    assert (np.abs(reduced[:, 3].astype(int) + reduced[:, 4] - 200) <= 1).all(), (
        "the edge stays between LR columns 3 and 4"
    )


def test_again_does_nothing_and_other_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path), "--shape", "2", "64", "64"]
    assert make_phantom.main(command) == 0
    before = tree(tmp_path)
    assert make_phantom.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(TargetError, match="something else"):
        make_phantom.make(tmp_path, (2, 64, 128))
    assert tree(tmp_path) == before
    (chunk,) = (tmp_path / "lr.zarr" / "0" / "c").rglob("0/0/0")
    chunk.write_bytes(b"damaged")
    assert make_phantom.main(command) == 2
    with pytest.raises(UserError, match="multiples of 8"):
        make_phantom.make(tmp_path / "new", (2, 60, 64))


def test_runs_as_a_script(tmp_path: Path) -> None:
    script = REPOSITORY / "examples" / "make_phantom.py"
    command = [sys.executable, str(script), "--out", str(tmp_path), "--shape", "1", "32", "32"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}, check=True)
    assert "are written" in done.stdout


@pytest.mark.parametrize("name", ["quickstart.yaml", "drosophila-vnc.yaml"])
def test_example_files_are_valid_and_stay_in_their_folder(name: str) -> None:
    config = load(REPOSITORY / "examples" / name)
    for url in (config.source.url, config.target.url):
        assert url.startswith((REPOSITORY / "examples" / "data").as_uri() + "/")
    shard, slab = config.target.shard_shape, config.work.slab_shape
    assert shard is not None
    assert slab is not None
    assert not any(slab.lateral(config.network.scale) % shard)


def test_real_stack_is_checked_and_reduced(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (shared_data / "drosophila-vnc-stack1" / "raw.tif").exists():
        pytest.skip("no drosophila-vnc-stack1 there")
    monkeypatch.setenv("EMSR_SHARED", str(SHARED))
    assert fetch_drosophila_vnc.main(["--out", str(tmp_path)]) == 0
    assert fetch_drosophila_vnc.main(["--out", str(tmp_path)]) == 0
    assert "CC BY-NC-SA" in capsys.readouterr().out
    lr = zarr.open_group(tmp_path / fetch_drosophila_vnc.NAME, mode="r")
    assert lr["0"].shape == (20, 128, 128)
    assert 110 < lr["0"][:].mean() < 150


def test_other_voxels_than_the_known_are_refused(tmp_path: Path, shared_data: Path) -> None:
    (tmp_path / fetch_drosophila_vnc.NAME).mkdir()
    (tmp_path / fetch_drosophila_vnc.NAME / "x").write_text("x")
    with pytest.raises(TargetError, match="something else"):
        fetch_drosophila_vnc.make(tmp_path)
    other = shared_data / "flyem-medulla-labelled-z40" / "raw.tif"
    with pytest.raises(UserError, match="sha256"):
        fetch_drosophila_vnc.read_checked(other)
