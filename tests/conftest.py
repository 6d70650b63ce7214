"""Tests share this: real data, small volumes, the main job run on them, waiting, and which skips are allowed."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("EMSR_SHARED", REPOSITORY.parent / "shared"))
TESTS = REPOSITORY / "tests"

# Dask's profiler can stop a worker for good (docs/clusters.md). Of clusters that a test starts itself it stays off.
os.environ.setdefault("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED", "False")

GUARD_S = 1200.0
"""A test that waits gives up after so many seconds, as a guard against hanging. None asserts a duration."""

# A shared machine's pauses are no failures.
hypothesis.settings.register_profile("emsr", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("emsr")
# For benchmarks/mutations.py: the same examples every time, and failures as they are found.
hypothesis.settings.register_profile(
    "mutations", hypothesis.settings.get_profile("ci"), phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
)


def pytest_configure() -> None:
    """A job that was started under nohup ignores SIGHUP, a process of pytest-xdist SIGINT; and so would all processes
    of these tests.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    refuse_skip(report)
    return report


def refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """A skip becomes a failure where EMSR_ALLOWED_SKIPS is set and none of its lines begins the skip's reason."""
    allowed = os.environ.get("EMSR_ALLOWED_SKIPS")
    if allowed is not None and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(tuple(line for line in allowed.splitlines() if line)):
            report.outcome, report.longrepr = "failed", f"this skip is not allowed here: {reason}"


@pytest.fixture
def shared_data() -> Path:
    """This is the folder of real EM; where it is missing the test is skipped and says so."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real EM at {SHARED / 'data'} (set EMSR_SHARED)")
    return SHARED / "data"


def texture(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """The array holds blobs and grain, uint8, different in every voxel's neighbourhood."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    smooth = 128 + 60 * np.sin(y / 5 + z / 3) * np.cos(x / 7 - z / 4)
    return np.clip(smooth + rng.normal(0, 18, shape), 0, 255).astype(np.uint8)


def write_lr(path: Path, voxels: np.ndarray, voxel_size_nm: tuple[float, float, float] = (45.0, 32.0, 32.0)) -> Path:
    """This writes an OME-Zarr 0.5 source with zarr-python and returns its path."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.create_array(
        "0", shape=voxels.shape, dtype=voxels.dtype, chunks=(4, 16, 16), config={"write_empty_chunks": True}
    )[:] = voxels
    transforms = [{"type": "scale", "scale": list(voxel_size_nm)}]
    axes = [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [
            {"name": "lr", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
        ],
    }
    return path


def volume_yaml(path: Path, source: Path | str, target: Path | str, **changes: Any) -> Path:
    """This writes a small volume.yaml. `changes` are dotted keys such as `work.slab_shape` with `.` written `__`."""
    body: dict[str, Any] = {
        "source": {"url": str(source)},
        "target": {"url": str(target), "chunk_shape": [2, 64, 64], "shard_shape": [2, 128, 128]},
        "network": {"name": "bicubic", "scale": 8},
        "work": {"slab_shape": [4, 32, 32]},
        "cluster": {"kind": "local", "workers": 1},
    }
    for dotted, value in changes.items():
        place = body
        *parents, last = dotted.split("__")
        for part in parents:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(body))
    return path


def tree(path: Path) -> dict[str, str]:
    """The result maps every file below `path` to the hash of its bytes, without the name that a target has in its
    metadata: that of the place where it was begun.
    """
    named = re.compile(rb'"name": "[^"]*"(?=,\s*"type": "lateral 2x2 mean")')
    return {
        str(f.relative_to(path)): hashlib.sha256(named.sub(b"", f.read_bytes())).hexdigest()
        for f in sorted(path.rglob("*"))
        if f.is_file()
    }


def main_job(
    yaml_path: Path, script: str = "run_standin.py", check: bool = True, **environ: str
) -> subprocess.CompletedProcess[str]:
    """The main job runs in a process of its own, as a user runs it. With `check` it must end well."""
    done = subprocess.run(
        [sys.executable, str(TESTS / script), str(yaml_path)]
        if script != "run"
        else [sys.executable, "-m", "pipeline.run", str(yaml_path)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=GUARD_S,
    )
    assert not check or done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def wait_until(ready: Callable[[], object], what: str = "nothing happened") -> None:
    """The caller goes on once `ready` holds; it raises AssertionError with `what` where that hangs."""
    end = time.monotonic() + GUARD_S
    while not ready():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def run_here(yaml_path: Path) -> Any:
    """This process does every task of a volume.yaml without Dask, and returns the job once all receipts are written."""
    from pipeline.config import volume as config
    from pipeline.config.urls import sidecar
    from pipeline.plan.receipt import WRITTEN
    from pipeline.prepare.place import claim
    from pipeline.prepare.prepare import prepare
    from pipeline.sections.survey import detect
    from pipeline.storage.kv import Store
    from pipeline.storage.ledger import Ledger
    from pipeline.worker.lease import process_lease

    wanted = config.load(yaml_path)
    store = Store(sidecar(wanted.target.url))
    prepared = prepare(wanted, lambda survey, source: detect(survey, source, store, keep=True))
    claim(prepared)
    ledger = Ledger(store, prepared.job.digest, prepared.job.plan.tasks, "here")
    for stage in prepared.job.plan.passes():
        result = process_lease(prepared.job, stage.start, stage.stop)
        assert all(r.state == WRITTEN for r in result.receipts), next(
            r.error for r in result.receipts if r.state != WRITTEN
        )
        ledger.record(result.receipts)
    ledger.flush()
    return prepared.job
