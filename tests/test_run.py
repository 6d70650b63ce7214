"""The main job on small volumes: what it writes, what it survives, what it says."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, texture, tree, volume_yaml, wait_until, write_lr
from test_inference import whole_bicubic

from pipeline import status, verify
from pipeline.worker.fidelity import back_projection_error
from pipeline.worker.pyramid import halve

SHAPE = (6, 72, 64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lr(tmp_path / "lr.zarr", texture(SHAPE))


def sr(tmp_path: Path, level: int = 0) -> np.ndarray:
    return np.asarray(zarr.open_array(tmp_path / "sr" / str(level), mode="r"))


def report(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "sr.emsr" / "report.json").read_text())


def test_the_main_job(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bicubic of the whole volume, every level, fidelity, ledger, report, status, verify, and a resume without work."""
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr")
    said = main_job(path, "run")
    events = {json.loads(line)["event"]: json.loads(line) for line in said.stderr.splitlines() if line.startswith("{")}
    assert events["cluster"]["scheduler"].startswith("tls://127.0.0.1:")
    assert events["ledger"]["written"] == events["ledger"]["planned"] > 12
    assert np.abs(sr(tmp_path).astype(int) - whole_bicubic(texture(SHAPE), 8)).max() <= 1
    for level in range(1, 4):
        assert (sr(tmp_path, level) == halve(sr(tmp_path, level - 1))).all()
    fidelity = np.asarray(zarr.open_array(tmp_path / "sr" / "fidelity" / "0", mode="r"))
    assert (fidelity == back_projection_error(texture(SHAPE), sr(tmp_path), 8)).all()

    told = report(tmp_path)
    computed = told["computed"]
    assert (computed["precision"], computed["batch"], computed["notes"]) == ("float32", 1, [])
    assert computed["devices"] == [entry["device"] for entry in told["crew"]]
    assert told["ledger"]["planned"] == told["ledger"]["written"]
    assert told["stored_bytes"] == sum(f.stat().st_size for f in (tmp_path / "sr").rglob("c/**/*") if f.is_file())
    assert (tmp_path / "sr.emsr" / "contact-sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert status.main([str(path)]) == 0
    assert verify.main([str(path)]) == 0
    before = tree(tmp_path)
    assert "is complete" in main_job(path, "run").stdout
    assert tree(tmp_path) == before
    assert str(Path.home()) not in (tmp_path / "sr" / "zarr.json").read_text() or str(Path.home()) in str(tmp_path)


def test_dry_run_prints_the_price_and_touches_nothing(source: Path, tmp_path: Path) -> None:
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr")
    before = tree(tmp_path)
    out = subprocess.run(
        [sys.executable, "-m", "pipeline.run", str(path), "--dry-run"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for word in ("slabs    12", "halo x", "memory", "per worker", "one slab", "time", "fidelity"):
        assert word in out
    assert tree(tmp_path) == before


def test_a_hole_is_quarantined_and_the_rest_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law 4: a missing chunk never becomes black. Mended, the same command repeats only what was missing."""
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", network__cell=16)
    chunk = source / "0" / "c" / "0" / "0" / "0"
    kept = chunk.read_bytes()
    chunk.unlink()
    said = main_job(path, "run", check=False)
    assert said.returncode == 1
    assert "1 of" in said.stderr
    assert "MissingChunkError" in said.stderr
    assert "Traceback" not in said.stderr
    told = report(tmp_path)
    assert told["failures"][0]["task"] == 0
    assert "Traceback" in told["failures"][0]["why"]
    assert not (tmp_path / "sr" / "0" / "c" / "0" / "0" / "0").exists()
    assert status.main([str(path)]) == 1
    assert "quarantined  task 0" in capsys.readouterr().out
    chunk.write_bytes(kept)
    main_job(path, "run")
    assert report(tmp_path)["this_run"]["written"] < 12
    assert np.abs(sr(tmp_path).astype(int) - whole_bicubic(texture(SHAPE), 8)).max() <= 1
    assert verify.main([str(path)]) == 0


def test_a_stated_fill_stands_in_for_a_hole(source: Path, tmp_path: Path) -> None:
    (source / "0" / "c" / "0" / "0" / "0").unlink()
    main_job(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__missing_chunks={"fill": 9}), "run")
    voxels = texture(SHAPE)
    voxels[:4, :16, :16] = 9
    assert np.abs(sr(tmp_path).astype(int) - whole_bicubic(voxels, 8)).max() <= 1


def test_masked_and_empty_slabs_are_skipped_and_the_ledger_closes(tmp_path: Path) -> None:
    voxels = texture(SHAPE)
    voxels[:4, 32:64, :32] = 77
    write_lr(tmp_path / "lr.zarr", voxels)
    mask = np.ones((6, 18, 16), np.uint8)
    mask[:, :8, 8:] = 0
    write_lr(tmp_path / "mask.zarr", mask, (45.0, 128.0, 128.0))
    main_job(
        volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__mask={"url": "mask.zarr"}, source__skip_empty=True),
        "run",
    )
    counts = report(tmp_path)["ledger"]
    assert counts["skipped"] == 2 + 1
    assert counts["planned"] == counts["written"] + counts["skipped"]
    assert (sr(tmp_path)[:, :256, 256:] == 0).all()
    assert (sr(tmp_path)[:4, 256:512, :256] == 0).all()
    assert (sr(tmp_path)[4:, 256:512, :256] != 0).any()
    assert (sr(tmp_path, 3) == halve(sr(tmp_path, 2))).all()


def test_a_bad_section_is_replaced_by_the_nearest_good_one(source: Path, tmp_path: Path) -> None:
    main_job(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__bad_sections={"list": [2, 3]}), "run")
    assert (sr(tmp_path)[2] == sr(tmp_path)[1]).all()
    assert (sr(tmp_path)[3] == sr(tmp_path)[4]).all()
    spec = json.loads((tmp_path / "sr" / "zarr.json").read_text())["attributes"]["emsr"]
    assert {z: one["stand_in"] for z, one in spec["source"]["bad_sections"].items()} == {"2": 1, "3": 4}
    assert {(one["why"], one["output"]) for one in spec["source"]["bad_sections"].values()} == {
        ("listed", "neighbours")
    }


def test_another_plan_on_the_same_target_is_refused(source: Path, tmp_path: Path) -> None:
    main_job(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr"), "run")
    before = tree(tmp_path)
    volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", target__encoding="zstd", work__slab_shape=[2, 32, 32])
    before["v.yaml"] = tree(tmp_path)["v.yaml"]
    said = main_job(tmp_path / "v.yaml", "run", check=False)
    assert said.returncode == 2
    assert 'target.encoding was "blosc-zstd", is "zstd"' in said.stderr
    assert "slab_shape was [4, 32, 32], is [2, 32, 32]" in said.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_drains_and_the_next_run_goes_on(signals: int, source: Path, tmp_path: Path) -> None:
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", network__name="nearest", work__slab_shape=[2, 16, 16])
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "STANDIN_DELAY_S": "0.05"}
    with subprocess.Popen(
        [sys.executable, str(TESTS / "run_standin.py"), str(path)],
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as client:
        wait_until(lambda: len(list((tmp_path / "sr").rglob("c/*/*/*"))) > 3 or client.poll() is not None)
        for _ in range(signals):
            os.killpg(client.pid, signal.SIGINT)  # as a terminal does: to every process of the group
            time.sleep(0.3)
        _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == 130, said
    assert "Traceback" not in said
    if signals == 1:
        assert "Run the same command again" in said
        told = report(tmp_path)
        assert told["this_run"]["quarantined"] == 0
        assert 0 < told["ledger"]["written"] < told["ledger"]["planned"]
    main_job(path)
    assert report(tmp_path)["ledger"]["pending"] == 0
    shutil.rmtree(tmp_path / "sr.emsr")
    (tmp_path / "sr").rename(tmp_path / "first")
    main_job(path)
    assert tree(tmp_path / "sr") == tree(tmp_path / "first")


def test_verify_finds_damage_and_the_next_run_repairs_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr")
    main_job(path, "run")
    good = tree(tmp_path / "sr")
    flipped, lost = (tmp_path / "sr" / "0" / "c" / name for name in ("0/1/1", "2/4/0"))
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(bytes(data))
    lost.unlink()
    assert verify.main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "stored bytes differ" in out
    assert "is missing" in out
    assert verify.main([str(path), "--requeue"]) == 1
    main_job(path, "run")
    assert verify.main([str(path)]) == 0
    assert tree(tmp_path / "sr") == good


def test_a_slab_that_kills_its_worker_is_given_up_and_the_rest_finishes(source: Path, tmp_path: Path) -> None:
    """Real processes die here: the network exits the process on one tile. Its lease mates are not lost with it."""
    path = volume_yaml(
        tmp_path / "v.yaml", "lr.zarr", "sr", network__name="nearest", network__cell=32, work__slab_shape=[4, 32, 32]
    )
    said = main_job(path, "run_poison.py", check=False, POISON="118")
    assert said.returncode == 1, said.stderr
    told = report(tmp_path)
    assert told["ledger"]["quarantined"] == 1
    assert "its worker died on every try" in told["failures"][0]["why"]
    assert told["ledger"]["written"] == 11


@contextlib.contextmanager
def dask_apart(
    folder: Path, script_path: str = ""
) -> Iterator[tuple[str, subprocess.Popen[bytes], subprocess.Popen[bytes]]]:
    """A scheduler and a worker in processes of their own: (address, scheduler, worker)."""
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}"}
    place = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    preload = ["--preload", script_path] if script_path else []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environ}
    with (
        subprocess.Popen(
            [
                *dask,
                "scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--no-dashboard",
                "--scheduler-file",
                str(place),
            ],
            **quiet,
        ) as scheduler,
        subprocess.Popen(
            [
                *dask,
                "worker",
                "--scheduler-file",
                str(place),
                "--nthreads",
                "2",
                "--no-nanny",
                "--no-dashboard",
                *preload,
            ],
            **quiet,
        ) as worker,
    ):
        try:
            wait_until(lambda: place.exists() and place.read_text().endswith("}"))
            yield json.loads(place.read_text())["address"], scheduler, worker
        finally:
            worker.kill()
            scheduler.kill()


def test_a_scheduler_that_is_already_there(source: Path, tmp_path: Path) -> None:
    with dask_apart(tmp_path) as (address, _, _):
        main_job(
            volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": address}), "run"
        )
    assert np.abs(sr(tmp_path).astype(int) - whole_bicubic(texture(SHAPE), 8)).max() <= 1


def test_a_scheduler_that_dies_under_way(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear message, no hang, nothing lost: the next run, on another cluster, goes on."""
    monkeypatch.setenv("STANDIN_DELAY_S", "0.05")
    keys = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}
    with dask_apart(tmp_path, str(TESTS / "run_standin.py")) as (address, scheduler, _):
        path = volume_yaml(
            tmp_path / "v.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": address}, **keys
        )
        with subprocess.Popen(
            [sys.executable, str(TESTS / "run_standin.py"), str(path)], stderr=subprocess.PIPE, text=True
        ) as client:
            wait_until(lambda: len(list((tmp_path / "sr").rglob("c/*/*/*"))) > 3 or client.poll() is not None)
            scheduler.kill()
            _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == 2, said
    assert "the Dask scheduler is gone" in said
    assert "Traceback" not in said
    main_job(volume_yaml(path, "lr.zarr", "sr", **keys))
    assert report(tmp_path)["ledger"]["pending"] == 0
