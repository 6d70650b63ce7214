"""The paper's network in the pipeline: law 1 with random weights, caches carried over slabs, weights refused or
found.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import main_job, run_here, texture, tree, volume_yaml, write_lr

import models
from models import weights
from models.network import SuperResolver
from pipeline import run
from pipeline.base.errors import NetworkError
from pipeline.inference.weights import locate
from pipeline.viewer.file_server import serving


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the small x8 preset, large enough that the residual shows."""
    torch.manual_seed(5)
    network = models.build("gpemsr", 8, "small")
    assert isinstance(network, SuperResolver)
    with torch.no_grad():
        for parameter in network.reconstruct.parameters():
            parameter.mul_(3)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    weights.save(path, network, licence="CC0-1.0 (random)")
    return path


KEYS = {"network__name": "gpemsr", "network__preset": "small", "network__cell": 16, "target__mips": 1}


def test_law_1_with_the_real_network(small: Path, tmp_path: Path) -> None:
    """Other slabs, workers with leases that carry caches, a box in the middle: the same bytes."""
    write_lr(tmp_path / "lr.zarr", texture((4, 24, 24)))
    keys = KEYS | {"network__weights": str(small)}
    run_here(volume_yaml(tmp_path / "a.yaml", "lr.zarr", "a", **keys, work__slab_shape=[4, 32, 32]))
    main_job(
        volume_yaml(tmp_path / "b.yaml", "lr.zarr", "b", **keys, work__slab_shape=[2, 16, 32], cluster__workers=2),
        "run",
    )
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    box = {"start": [2, 11, 7], "stop": [4, 24, 23]}
    run_here(volume_yaml(tmp_path / "c.yaml", "lr.zarr", "c", **keys, source__box=box))
    whole, part = (np.asarray(zarr.open_array(tmp_path / name / "0", mode="r")) for name in ("a", "c"))
    assert (part == whole[2:4, 88:192, 56:184]).all()
    assert whole.std() > 10
    provenance = json.loads((tmp_path / "a" / "zarr.json").read_text())["attributes"]["emsr"]
    assert provenance["network"]["weights_sha256"] == hashlib.sha256(small.read_bytes()).hexdigest()
    assert str(small) not in (tmp_path / "a" / "zarr.json").read_text()


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lr(tmp_path / "lr.zarr", texture((4, 16, 16)))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(small.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("weights")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    cases = [
        ({"network__weights": str(small), "network__scale": 16}, "is for scale 8, preset small"),
        ({"network__weights": str(small), "network__preset": "paper"}, "is for scale 8, preset small"),
        ({"network__weights": str(small), "network__sha256": "0" * 64}, "has sha256"),
        ({"network__weights": "text.safetensors"}, "no safetensors"),
        ({"network__weights": "nowhere.safetensors"}, "is not there"),
        ({"network__weights": str(cut)}, "cannot be read as weights"),
        ({"network__weights": "other.pth"}, "missing"),
    ]
    before = tree(tmp_path)
    for keys, words in cases:
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **(KEYS | keys))
        assert run.main([str(path)]) == 2, words
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said
        path.unlink()
        assert tree(tmp_path) == before


def test_weights_by_url_are_fetched_once_and_checked(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMSR_CACHE", str(tmp_path / "cache"))
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    sha256 = hashlib.sha256(small.read_bytes()).hexdigest()
    with serving({"weights": small.parent}) as urls:
        keys = KEYS | {"network__weights": f"{urls['weights']}/{small.name}", "network__sha256": sha256}
        run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys))
    kept = tmp_path / "cache" / f"{sha256}.safetensors"
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [kept.name]
    kept.write_bytes(small.read_bytes()[:-1])
    with serving({"weights": small.parent}) as urls:
        url = f"{urls['weights']}/{small.name}"
        assert locate(url, sha256) == (kept, sha256), "a file that has rotted in the cache is fetched again"
        other = "0" * 64
        with pytest.raises(NetworkError, match=f"{url} has sha256 {sha256}"):
            locate(url, other)
        (tmp_path / "file").touch()
        monkeypatch.setenv("EMSR_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(NetworkError, match="EMSR_CACHE"):
            locate(url, sha256)
    assert [f.name for f in (tmp_path / "cache").iterdir()] == [kept.name], "nothing else is kept"


@pytest.mark.parametrize("precision", ["bfloat16"])
def test_lower_precision_runs_and_stays_near(precision: str, small: Path, tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    keys = KEYS | {"network__weights": str(small)}
    run_here(volume_yaml(tmp_path / "a.yaml", "lr.zarr", "a", **keys))
    run_here(volume_yaml(tmp_path / "b.yaml", "lr.zarr", "b", **keys, network__precision=precision))
    exact, near = (np.asarray(zarr.open_array(tmp_path / name / "0", mode="r")).astype(int) for name in "ab")
    assert 0 < np.abs(exact - near).mean() < 8


@pytest.mark.parametrize("scale", [8, 16])
def test_threads_do_not_change_a_bit_of_the_network(scale: int) -> None:
    """Workers of different sizes must agree (law 1)."""
    torch.manual_seed(6)
    network = models.build("gpemsr", scale, "small").eval()
    window = torch.rand(1, 5, 1, 16, 24)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(network.fuse_window([network.encode_section(section) for section in window[0, :, None]]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
