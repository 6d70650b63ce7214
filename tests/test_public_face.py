"""`import emsr`, and where commands and the processes they start import from: never from the user's folder."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, texture, tree, volume_yaml, write_lr
from test_clusters import dask, scheduler

import emsr
import pipeline
from pipeline.cluster import batch, kubernetes
from pipeline.config.cluster import ClusterConfig

FOREIGN = {
    "models": "models/__init__.py",
    "models.py": "models.py",
    "pipeline": "pipeline/__init__.py",
    "pipeline.py": "pipeline.py",
}
MODULES = [["-m", "emsr", "run"], ["-m", "pipeline", "run"], ["-m", "pipeline.run"], ["-m", "pipeline.status"]]
WAYS = [
    pytest.param(name, way, id=f"{name} {' '.join(way)}")
    for name in FOREIGN
    for way in MODULES
    if not (name.startswith("pipeline") and way[1].startswith("pipeline"))  # Python then runs the user's own
]
POISONED = ["multiprocessing", "pickle", "socket", "numpy", "select"]
"""Modules that a spawned process imports first, and one that every command does."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A user's folder with a volume and its volume.yaml."""
    folder = tmp_path / "place"
    folder.mkdir()
    write_lr(folder / "lr.zarr", texture((6, 40, 32)))
    volume_yaml(folder / "volume.yaml", "lr.zarr", "sr", network__name="nearest", cluster__workers=2)
    return folder


@pytest.fixture
def script(tmp_path: Path) -> str:
    """The script `emsr` as pip would write it, in a folder of its own."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    name, target = (part.strip() for part in setup["options.entry_points"]["console_scripts"].split("="))
    module, function = target.split(":")
    path = tmp_path / "bin" / name
    path.parent.mkdir()
    path.write_text(
        f"import sys\nfrom {module} import {function}\nif __name__ == '__main__':\n    sys.exit({function}())\n"
    )
    return str(path)


def python(folder: Path, *args: str, path: str = str(REPOSITORY)) -> subprocess.CompletedProcess[str]:
    """A Python process in `folder`; `path` is its PYTHONPATH."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"} | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *args], cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=250
    )


def add_foreign(folder: Path, name: str) -> Path:
    """A package or module of the user's own that leaves a file behind when it is executed."""
    path = folder / FOREIGN[name]
    path.parent.mkdir(exist_ok=True)
    path.write_text("open(__file__ + '.executed', 'w')\n")
    return path


def assert_refused(done: subprocess.CompletedProcess[str], found: Path) -> None:
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    name = found.stem if found.stem in ("models", "pipeline") else found.parent.name
    assert line.startswith(f"emsr: `import {name}` finds {found}. Wanted: emsr's own, {REPOSITORY / name}. ")
    assert done.stdout == ""


def test_the_version_is_that_of_the_installation() -> None:
    assert emsr.__version__ == pipeline.__version__ == importlib.metadata.version("emsr")


def test_the_version_is_told(tmp_path: Path) -> None:
    done = python(tmp_path, "-m", "emsr", "--version")
    assert (done.returncode, done.stdout) == (0, f"emsr {emsr.__version__}\n"), done.stderr


def test_importing_emsr_imports_nothing_else(tmp_path: Path) -> None:
    program = "import sys; before = set(sys.modules); import emsr; print(*sorted(set(sys.modules) - before))"
    assert python(tmp_path, "-c", program).stdout.split() == ["emsr"]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_another_package_in_the_current_folder_is_named(place: Path, name: str, way: list[str]) -> None:
    """One line, exit code 2, nothing executed or written."""
    found = add_foreign(place, name)
    before = tree(place)
    assert_refused(python(place, *way, "volume.yaml"), found)
    assert tree(place) == before


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_another_package_on_pythonpath_is_named(place: Path, tmp_path: Path, name: str, way: list[str]) -> None:
    (tmp_path / "theirs").mkdir()
    found = add_foreign(tmp_path / "theirs", name)
    before = tree(tmp_path)
    assert_refused(python(place, *way, "volume.yaml", path=f"{tmp_path / 'theirs'}:{REPOSITORY}"), found)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("way", [["-m", "pipeline", "run"], ["-m", "pipeline.run"]])
@pytest.mark.parametrize("file", ["emsr/__init__.py", "emsr.py"])
def test_another_emsr_is_named_and_not_executed(place: Path, file: str, way: list[str]) -> None:
    found = place / file
    found.parent.mkdir(exist_ok=True)
    found.write_text("open(__file__ + '.executed', 'w')\n")
    before = tree(place)
    done = python(place, *way, "volume.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"emsr: `import emsr` finds {found}. Wanted: emsr's own, {REPOSITORY / 'emsr'}. ")
    assert tree(place) == before


@pytest.mark.parametrize("name", FOREIGN)
def test_the_script_names_another_package(place: Path, script: str, name: str) -> None:
    """The current folder is in its way only where PYTHONPATH says so."""
    found = add_foreign(place, name)
    before = tree(place)
    assert_refused(python(place, script, "run", "volume.yaml", path=f".:{REPOSITORY}"), found)
    assert python(place, script, "status", "volume.yaml").stdout.startswith("nothing was run")
    assert tree(place) == before


def test_a_folder_of_files_called_models_is_no_obstacle(place: Path) -> None:
    (place / "models").mkdir()
    (place / "models" / "mine.safetensors").touch()
    done = python(place, "-m", "emsr", "status", "volume.yaml")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("nothing was run")


def test_nothing_beside_the_volume_is_executed(place: Path, script: str) -> None:
    """Modules named like those of Python and others: not in commands, the trial slab's process, workers, helpers."""
    for name in POISONED:
        (place / f"{name}.py").write_text("open(__file__ + '.executed', 'w')\nraise ImportError('poisoned')\n")
    add_foreign(place, "models")  # not in the script's way
    python(place, "-c", "import socket")
    (place / "socket.py.executed").unlink()  # it would have been
    price = python(place, script, "run", "--dry-run", "volume.yaml")
    assert price.returncode == 0, price.stderr
    assert "one slab" in price.stdout
    done = python(place, script, "run", "volume.yaml")
    assert done.returncode == 0, done.stderr
    assert '"workers": 2' in done.stderr
    assert python(place, script, "status", "volume.yaml").returncode == 0
    (place / "models" / "__init__.py").unlink()
    again = python(place, "-m", "pipeline.status", "volume.yaml")
    assert again.returncode == 0, again.stderr
    assert list(place.rglob("*.executed")) == []


CHILD = """
import subprocess, sys
from emsr import start
start.command()
subprocess.run([sys.executable, "-c", "import sys, emsr; print(emsr.__file__, '' in sys.path)"], check=True)
"""


def test_a_checkout_that_is_not_installed_works_from_its_own_folder() -> None:
    """There the current folder is emsr's home, and processes that inherit the environment find it."""
    assert python(REPOSITORY, "-c", CHILD, path="").stdout.split() == [emsr.__file__, "False"]


def test_a_worker_that_finds_another_package_is_refused(place: Path, tmp_path: Path) -> None:
    """A cluster that is already there: the client says which worker, with the same line."""
    (tmp_path / "theirs").mkdir()
    found = add_foreign(tmp_path / "theirs", "models")
    theirs = {"PYTHONPATH": f"{tmp_path / 'theirs'}:{REPOSITORY}", "PYTHONSAFEPATH": "1"}
    with scheduler(tmp_path) as (address, join), dask(*join, **theirs):
        volume_yaml(place / "volume.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": address})
        before = tree(place)
        done = python(place, "-m", "emsr", "run", "volume.yaml")
    assert done.returncode == 2, done.stderr
    assert f"it cannot do what this emsr asks: `import models` finds {found}. Wanted: " in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(place) == before


def test_jobs_pods_and_containers_do_not_import_from_where_they_start() -> None:
    job = {"walltime": "1:00:00", "memory": "2GB"}
    asked = ClusterConfig.model_validate({"kind": "slurm", "host": "127.0.0.1", "slurm": job})
    assert "\nexport PYTHONSAFEPATH=1\n" in batch.script(asked, 2, None)
    asked = ClusterConfig.model_validate({"kind": "kubernetes", "kubernetes": {"image": "emsr", "memory": "2GB"}})
    pods = yaml.safe_load(kubernetes.manifest(asked, 2))["spec"]
    for pod in (pods["worker"], pods["scheduler"]):
        assert {"name": "PYTHONSAFEPATH", "value": "1"} in pod["spec"]["containers"][0]["env"]
    services = yaml.safe_load((REPOSITORY / "deploy" / "compose.yaml").read_text())["services"]
    assert services["worker"]["environment"]["PYTHONSAFEPATH"] == "1"
    assert services["scheduler"]["environment"]["PYTHONSAFEPATH"] == "1"
    assert " PYTHONSAFEPATH=1\n" in (REPOSITORY / "deploy" / "slurm" / "allocation.sbatch").read_text()
