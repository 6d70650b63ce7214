"""Import contracts mean what they say, and every import that tests and benchmarks make of ours leads somewhere."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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


def stale_names(path: Path) -> list[str]:
    """Names of ours that this file imports, or reads from a module of ours, and that are not there."""
    parsed, modules, stale = ast.parse(path.read_text()), {}, []
    for node in ast.walk(parsed):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("emsr", "models", "pipeline"):
            for name in node.names:
                try:
                    module = importlib.import_module(str(node.module))
                    if not hasattr(module, name.name):
                        importlib.import_module(f"{node.module}.{name.name}")
                    found = getattr(module, name.name)
                except ImportError:
                    stale.append(f"{path.name}:{node.lineno}: {node.module}.{name.name}")
                    continue
                if isinstance(found, ModuleType):
                    modules[name.asname or name.name] = found
    for node in ast.walk(parsed):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            if not hasattr(module, node.attr) and not isinstance(node.ctx, ast.Store):
                stale.append(f"{path.name}:{node.lineno}: {module.__name__}.{node.attr}")
    return stale


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_no_name_of_ours_is_stale(folder: str) -> None:
    """Benchmarks and tests for root alone are not run on every machine, and mypy does not read them."""
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    assert not [name for path in files for name in stale_names(path)]
