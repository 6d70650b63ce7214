"""`emsr doctor` says what the devices here compute, and finds a device that computes something else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, volume_yaml

from models import network, vectors
from models.layers import bilinear
from pipeline import doctor
from pipeline.config.cluster import ClusterConfig
from pipeline.config.volume import NetworkConfig
from pipeline.inference.describe import describe
from pipeline.prepare.measured import measured_device
from pipeline.selftest import diagnose, machine
from pipeline.selftest.networks import Window
from pipeline.selftest.vectors import judge

KEYS = {
    "vectors": {"name", "precision", "difference", "tolerance", "psnr_db", "least_psnr_db", "indices_changed", "ok"},
    "same": {"precision", "twice", "other_place"},
    "rates": {
        *("name", "preset", "scale", "cell", "halo", "precision", "batch", "encode_ms", "fuse_ms", "sr_voxels_per_s"),
        *("tflops", "share", "psnr_db", "indices_changed", "peak_bytes", "formula_bytes"),
    },
}
"""`cluster.measured` and people's scripts read them: keys are added, never renamed."""


@pytest.fixture(scope="module")
def report() -> Any:
    """What the command prints here, as a user would call it."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "doctor", "--json"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.startswith("emsr:   0 s, ")
    return json.loads(done.stdout)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command looks at the first vector only, and times a small tile of it only."""
    monkeypatch.setattr(diagnose, "VECTORS", vectors.VECTORS[:1])
    monkeypatch.setattr(diagnose, "SMALLEST", ("small", 8, 1))
    monkeypatch.setattr(diagnose, "RATES_S", {"cpu": 0.0})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_the_json_has_the_keys_that_others_read(report: Any) -> None:
    assert {"emsr", "date", "machine", "ok", "devices"} <= set(report)
    assert report["ok"] is True
    assert {
        "cpu",
        "usable_cores",
        "memory_bytes",
        "open_files",
        "free_disk_bytes",
        "torch",
        "driver",
        "problems",
    } <= set(report["machine"])
    for device in report["devices"]:
        assert {"kind", "memory_bytes", "matrix_tflops", "vectors", "same", "rates", "notes", "error"} == set(device)
        for part, keys in KEYS.items():
            assert device[part], part
            for entry in device[part]:
                assert set(entry) == keys


def test_every_device_computes_the_reference_vectors(report: Any) -> None:
    """They were computed by this network in float32 on a CPU, so the file and the formulas are still those."""
    for device in report["devices"]:
        exact = [found for found in device["vectors"] if found["precision"] == "float32"]
        assert [found["name"] for found in exact] == [vector.name for vector in vectors.VECTORS]
        assert all(found["difference"] <= found["tolerance"] and not found["indices_changed"] for found in exact)
        assert {found["precision"] for found in device["vectors"]} == set(device["matrix_tflops"])


def test_rates_agree_with_each_other(report: Any) -> None:
    for device in report["devices"]:
        for rate in device["rates"]:
            seconds = (rate["encode_ms"] + rate["fuse_ms"]) / 1000
            assert rate["sr_voxels_per_s"] == pytest.approx((rate["cell"] * rate["scale"]) ** 2 / seconds)
            assert rate["share"] == pytest.approx(rate["tflops"] / device["matrix_tflops"][rate["precision"]])
        assert device["rates"][0]["precision"] == "float32"
        assert device["rates"][0]["psnr_db"] is None


def test_a_price_takes_the_rates_of_this_machine(report: Any, tmp_path: Path) -> None:
    """`cluster.measured` names the file that the command wrote."""
    path = tmp_path / "doctor.json"
    path.write_text(json.dumps(report))
    network = describe(NetworkConfig(name="gpemsr", scale=8, weights="builtin"))
    cluster = ClusterConfig(kind="local", workers=1, gpus_per_worker=0, measured=str(path))
    found = measured_device(cluster, network)
    assert found is not None
    assert found.kind == report["devices"][-1]["kind"]
    assert set(found.fits(network)) == set(report["devices"][-1]["matrix_tflops"])


def test_the_script_writes_the_vectors_that_come_with_emsr(tmp_path: Path) -> None:
    """Its own check that the likeliest codes are far apart holds, and what it finds is what is stored."""
    script = [sys.executable, "benchmarks/reference_vectors.py", str(tmp_path / "vectors.npz")]
    subprocess.run(script, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    with np.load(tmp_path / "vectors.npz") as made, np.load(vectors.PATH) as stored:
        assert set(made) == set(stored)
        for name in stored:
            allowed = 1e-4 * vectors.STEPS if name.endswith("sr") else 0
            assert np.abs(made[name].astype(int) - stored[name]).max() <= allowed, name


def test_the_vectors_are_small_and_reach_both_presets_and_scales() -> None:
    assert vectors.PATH.stat().st_size < 400_000
    assert {(vector.preset, vector.scale) for vector in vectors.VECTORS} == {
        (preset, scale) for preset in ("small", "paper") for scale in (8, 16)
    }


def test_formulas_give_what_they_gave() -> None:
    """Worked out by hand from the formulas, with MurmurHash3's published last step: fmix32(1) is 0x514E28B7."""
    z, y, x = 1, 2, 3
    stripes = abs(2 * ((3 * x + 5 * y + 4 * z) % 61) - 61) * 80 // 61
    other = abs(2 * ((5 * x - 2 * y + 3 * z) % 97) - 97) * 80 // 97
    bits = z * 1_000_003 + y * 10_007 + x
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    assert vectors.voxels((z, y, x), (1, 1, 1)).item() == 40 + stripes + other + (bits >> 27)
    assert vectors._hash(np.array([1], np.uint32))[0] == 0x514E28B7
    kernel = vectors.weight("a.weight", (64, 32, 3, 3))
    assert float(np.abs(kernel).max()) <= math.sqrt(3 / 288)
    assert kernel.var() == pytest.approx(1 / 288, rel=0.05)


@pytest.mark.usefixtures("short")
def test_a_layer_that_computes_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousandth more in one place of the network: exit code 1, and the verdict names device and vector first."""
    monkeypatch.setattr(network, "bilinear", lambda x, factor: bilinear(x, factor) * 1.001)
    assert doctor.main([]) == 1
    title, verdict = capsys.readouterr().out.splitlines()[:2]
    assert title.startswith("emsr ")
    assert verdict.startswith(
        f"verdict      WRONG: cpu {os.uname().machine}: reference vector flyem-medulla x8 in float32"
    )


@pytest.mark.usefixtures("short")
def test_other_vectors_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One SR voxel off by 2e-4, and one index."""
    with np.load(vectors.PATH) as found:
        arrays = dict(found)
    name = vectors.VECTORS[0].name
    arrays[f"{name} sr"][3, 5] += round(2e-4 * vectors.STEPS)
    arrays[f"{name} indices"][0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    monkeypatch.setattr(vectors, "PATH", tmp_path / "other.npz")
    assert doctor.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    exact = next(v for v in found["devices"][0]["vectors"] if v["precision"] == "float32")
    assert found["ok"] is exact["ok"] is False
    assert exact["difference"] == pytest.approx(2e-4, rel=0.1)
    assert exact["indices_changed"] == 1


@pytest.mark.usefixtures("short")
def test_other_bytes_of_the_same_tile_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network that adds a grey level more with every call: not the same twice, nor at another place."""
    calls = [0]

    def drifting(x: torch.Tensor, factor: float) -> torch.Tensor:
        calls[0] += factor == 8
        return bilinear(x, factor) + calls[0] / 255

    monkeypatch.setattr(network, "bilinear", drifting)
    assert doctor.main(["--json"]) == 1
    same = json.loads(capsys.readouterr().out)["devices"][0]["same"]
    assert same[0] == {"precision": "float32", "twice": False, "other_place": False}


@pytest.mark.usefixtures("short")
def test_a_device_that_cannot_compute_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(x: torch.Tensor, factor: float) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(network, "bilinear", refuse)
    assert doctor.main([]) == 1
    assert (
        "RuntimeError: CUDA error: no kernel image is available for execution on the device\n"
        in capsys.readouterr().out
    )


@pytest.mark.usefixtures("short")
def test_the_network_of_volume_yaml_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither source nor target need be there; that the source is not is a note."""
    monkeypatch.setattr(diagnose, "RATES_S", {"cpu": 1000.0})
    path = volume_yaml(tmp_path / "volume.yaml", "nowhere.zarr", "sr", network__name="bicubic", network__cell=24)
    assert doctor.main([str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (rate,) = found["devices"][0]["rates"]
    assert (rate["name"], rate["preset"], rate["cell"], rate["halo"], rate["batch"]) == ("bicubic", None, 24, 8, 1)
    assert "nowhere.zarr" in found["devices"][0]["notes"][0]
    assert str(tmp_path) in found["machine"]["free_disk_bytes"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (None, "volume.yaml"),
        ({"network__name": "gpemsr", "network__weights": "none.safetensors"}, "is not there"),
        ({"network__name": "nowhere"}, "network.name"),
    ],
)
def test_mistakes(keys: dict[str, str] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "volume.yaml"
    if keys is not None:
        volume_yaml(path, "lr.zarr", "sr", **keys)
    assert doctor.main([str(path)]) == 2
    out, errors = capsys.readouterr()
    assert not out
    assert said in errors
    assert "Traceback" not in errors


def section(*values: float) -> Window:
    return Window(np.array(values, np.float32), np.array([7]))


def test_what_each_precision_must_reach() -> None:
    """An error of 1e-3 everywhere is 60 dB, one of 10^-2.25 is 45 dB."""
    zero = section(0, 0)
    assert judge("v", "float32", section(9e-5, 0), zero).ok
    assert not judge("v", "float32", section(2e-4, 0), zero).ok
    assert not judge("v", "float32", Window(zero.sr, np.array([8])), zero).ok
    for precision, worst_db in (("tf32", 60), ("bfloat16", 45), ("float16", 45)):
        error = 10 ** (-worst_db / 20)
        assert judge("v", precision, section(0.99 * error, 0.99 * error), zero).ok
        assert not judge("v", precision, section(1.01 * error, 1.01 * error), zero).ok


def test_an_overflow_is_a_fault_only_where_it_was_asked_for() -> None:
    for may, ok in ((True, True), (False, False)):
        found = judge("v", "float16", section(math.nan, 0), section(0, 0), may)
        assert (found.difference, found.psnr_db, found.ok) == (None, None, ok)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_75", "sm_100", "sm_120"], (7, 0), False),
        (["sm_100"], (10, 3), True),
    ],
)
def test_which_gpus_a_build_of_torch_serves(built: list[str], capability: tuple[int, int], runs: bool) -> None:
    """CUDA's rule: machine code runs on its major version from its minor on, PTX on everything later."""
    assert machine.supports(built, capability) is runs


def test_a_gpu_that_torch_does_not_see_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program in nvidia-smi's place that lists two."""
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '550.54.15, NVIDIA H100 80GB HBM3'\necho '550.54.15, NVIDIA H100 80GB HBM3'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine.describe()
    assert (found["driver"], found["gpus"]) == ("550.54.15", ["NVIDIA H100 80GB HBM3"] * 2)
    (problem,) = found["problems"]
    assert "2" in problem
    assert "built without CUDA" in problem or "unset it" in problem
