"""Import contracts mean what they say: a change that breaks one is seen, also in a file that no contract names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

PLANTED = {
    "a network that imports Dask": ("models/network.py", "import dask"),
    "a network that imports the pipeline": ("models/training/new.py", "from pipeline.base import geometry"),
    "a command that imports a network": ("pipeline/verify.py", "import models.network"),
    "a new file of storage that imports a network": ("pipeline/storage/sources/new.py", "from models import build"),
    "a lower room that imports a higher one": ("pipeline/storage/kv.py", "from pipeline.worker import job"),
    "a new file that imports a higher room": ("pipeline/plan/new.py", "from pipeline.schedule import leases"),
    "a new room without a place": ("pipeline/novelties/__init__.py", "from pipeline.base import geometry"),
    "a plan that imports torch": ("pipeline/plan/price.py", "import torch"),
    "a job that stands on storage": ("pipeline/worker/job.py", "from pipeline.storage import kv"),
    "scheduling that stands on inference": ("pipeline/schedule/leases.py", "from pipeline.worker import slab"),
    "two files in a circle": ("pipeline/plan/lattice.py", "from pipeline.plan import plan"),
    "a file format outside storage": ("pipeline/prepare/prepare.py", "import tensorstore"),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in ("emsr", "pipeline", "models"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / package, folder / package, ignore=ignored)
    shutil.copy(REPOSITORY / "setup.cfg", folder)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--config", "setup.cfg", "--no-cache"]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )


def test_the_code_keeps_them(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_violation_is_seen(what: str, copy: Path) -> None:
    name, line = PLANTED[what]
    path = copy / name
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text(line + "\n" if before is None else before + f"\n{line}\n")
    try:
        done = lint(copy)
    finally:
        if before is None:
            path.unlink()
            if path.name == "__init__.py":
                shutil.rmtree(path.parent)
        else:
            path.write_text(before)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout or "Missing layer" in done.stdout or "not listed as layers" in done.stdout, (
        done.stdout
    )
