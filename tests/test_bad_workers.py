"""Workers that a run cannot use are set aside by name and reason; the others do its work, all of it and right."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr
from conftest import REPOSITORY, main_job, run_here, texture, tree, volume_yaml, wait_until, write_lr
from distributed import Client

from pipeline.schedule.run_state import RunState
from pipeline.schedule.sample import look_for
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.targets.open import open_target
from pipeline.storage.targets.task_objects import object_keys
from pipeline.worker.lease import process_lease

SHAPE = (16, 32, 32)


@contextlib.contextmanager
def started(folder: Path, *command: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environ}
    with subprocess.Popen(command, cwd=folder, env=variables, **quiet) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


class Cluster:
    """A scheduler and workers, each a process, that outlive runs."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._described = folder / "scheduler.json"
        self.pids: dict[str, int] = {}
        self._start(
            "scheduler", ["--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self._described)], (), {}
        )
        wait_until(lambda: self._described.exists() and self._described.read_text().endswith("}"))
        self.address = json.loads(self._described.read_text())["address"]

    def join(self, name: str, before: Sequence[str] = (), nanny: bool = False, **environ: str) -> None:
        """Start a worker by a command that begins with `before`."""
        found = ["--scheduler-file", str(self._described), "--nthreads", "1", "--memory-limit", "0"]
        self._start("worker", found + ["--no-nanny"] * (not nanny), before, environ, name)

    def _start(
        self, part: str, arguments: list[str], before: Sequence[str], environ: dict[str, str], name: str = ""
    ) -> None:
        dask = [sys.executable, "-m", "dask", part, *arguments, "--no-dashboard"]
        process = self._stack.enter_context(started(self.folder, *before, *dask, **environ))
        self.pids[name or part] = process.pid

    def wait_for(self, workers: int) -> None:
        """Wait until so many workers are there."""
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(workers)

    def yaml(self, source: str, target: str, **changes: Any) -> Path:
        there = {"kind": "address", "address": self.address}
        path = self.folder / f"{Path(target).name}.yaml"
        small = {
            "target__chunk_shape": [1, 64, 64],
            "target__shard_shape": [1, 128, 128],
            "work__slab_shape": [1, 16, 16],
        }
        return volume_yaml(path, self.folder / source, self.folder / target, cluster=there, **(small | changes))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def in_a_view_of_its_own(script: str) -> list[str]:
    """The beginning of a command whose process sees other mounts, those that `script` makes."""
    return ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh"]


def other_commit(folder: Path) -> Path:
    """A copy of the installed sources in which one line differs: bilinear for bicubic."""
    for package in ("emsr", "pipeline", "models"):
        shutil.copytree(
            REPOSITORY / package,
            folder / package,
            copy_function=lambda source, copy: os.symlink(source, copy),
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    changed = folder / "models/baselines/interpolation.py"
    text = changed.read_text()
    changed.unlink()
    assert 'mode="bicubic"' in text
    changed.write_text(text.replace('mode="bicubic"', 'mode="bilinear"'))
    return folder


def reference(folder: Path, yaml_path: Path, name: str) -> np.ndarray:
    """The voxels of the same volume.yaml, made in this process without a cluster."""
    body = yaml.safe_load(yaml_path.read_text())
    body["target"]["url"] = str(folder / name)
    body.get("work", {}).pop("requests_per_second", None)
    alone = folder / f"{name}.yaml"
    alone.write_text(yaml.safe_dump(body))
    run_here(alone)
    return np.asarray(zarr.open_array(folder / name / "0", mode="r"))


def aside(folder: Path, target: str) -> dict[str, str]:
    found = json.loads((folder / f"{target}.emsr" / "report.json").read_text())["set_aside"]
    assert isinstance(found, dict)
    return found


def needs_mounts() -> None:
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"mount namespaces are not permitted here: {tried.stderr.strip()}")


def test_five_kinds_of_bad_worker(tmp_path: Path, cluster: Cluster) -> None:
    """Two good workers and five bad ones: the run ends well, names the five with why, and its voxels are right.

    The same cluster then runs another job, of a source that was mended where it lies.
    """
    needs_mounts()
    for folder in ("lr", "out"):
        (tmp_path / folder).mkdir()
    write_lr(tmp_path / "lr/em.zarr", texture(SHAPE))
    kinds = {
        "has other sources": ([], {"PYTHONPATH": str(other_commit(tmp_path / "other"))}),
        "em.zarr": (in_a_view_of_its_own(f"mount -t tmpfs none {tmp_path}/lr"), {}),
        "is not the client's": (in_a_view_of_its_own(f"mount -t tmpfs none {tmp_path}/out"), {}),
        "read-only": (
            in_a_view_of_its_own(
                f"mount --bind {tmp_path}/out {tmp_path}/out && mount -o remount,ro,bind {tmp_path}/out"
            ),
            {},
        ),
        "torch": (["prlimit", f"--as={700 << 20}"], {}),
    }
    for why, (before, environ) in kinds.items():
        cluster.join(why, before, False, **environ)
    for name in ("good", "better"):
        cluster.join(name)
    cluster.wait_for(7)
    path = cluster.yaml("lr/em.zarr", "out/sr.zarr")
    said = main_job(path, "run")
    assert sorted(map(kind_of(kinds, cluster), aside(tmp_path, "out/sr.zarr").items())) == sorted(kinds)
    for why in kinds:
        assert f"process {cluster.pids[why]}" in said.stderr
    status = subprocess.run(
        [sys.executable, "-m", "pipeline.status", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert status.count("set aside") == 5
    found = np.asarray(zarr.open_array(tmp_path / "out/sr.zarr/0", mode="r"))
    np.testing.assert_array_equal(found, reference(tmp_path, path, "alone.zarr"))
    assert not list((tmp_path / "out/sr.zarr.emsr").glob("token-*"))

    shutil.rmtree(tmp_path / "lr/em.zarr")
    write_lr(tmp_path / "lr/em.zarr", texture(SHAPE, seed=5))
    again = cluster.yaml("lr/em.zarr", "out/second.zarr", network__name="nearest")
    main_job(again, "run")
    assert len(aside(tmp_path, "out/second.zarr")) == 5
    found = np.asarray(zarr.open_array(tmp_path / "out/second.zarr/0", mode="r"))
    np.testing.assert_array_equal(found, reference(tmp_path, again, "alone-too.zarr"))


def test_a_worker_whose_process_dies_with_every_lease(tmp_path: Path, cluster: Cluster) -> None:
    """It answers well, and its nanny starts it again each time: once the other one has finished what three of them
    died with, it gets no more and is named.
    """
    write_lr(tmp_path / "em.zarr", texture((24, 32, 32)))
    deaths, dying = tmp_path / "deaths", tmp_path / "dying.py"
    dying.write_text(
        "import os, pathlib, signal\n"
        "from pipeline.worker import lease\n"
        "def die(*arguments):\n"
        f"    with pathlib.Path({str(deaths)!r}).open('a') as file:\n"
        "        file.write('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "lease.process_lease = die\n"
    )
    cluster.join("dies", nanny=True, DASK_DISTRIBUTED__WORKER__PRELOAD=json.dumps([str(dying)]))
    cluster.join("good")
    cluster.wait_for(2)
    slowly = {"work__requests_per_second": {"write": 8}}
    path = cluster.yaml("em.zarr", "sr.zarr", network__name="nearest", **slowly)
    said = main_job(path, "run")
    ((who, why),) = aside(tmp_path, "sr.zarr").items()
    assert "process" in who
    assert f"{cluster.pids['good']}" not in who
    assert "its process died 3 times with tasks that others finished" in why
    assert who in said.stderr
    assert 3 <= len(deaths.read_text()) < 10, "its next process was given leases before anybody had asked it"
    found = np.asarray(zarr.open_array(tmp_path / "sr.zarr/0", mode="r"))
    np.testing.assert_array_equal(found, reference(tmp_path, path, "alone.zarr"))


def test_a_worker_that_freezes_is_told(tmp_path: Path, cluster: Cluster) -> None:
    """It is the only one, and goes on when the line has come."""
    write_lr(tmp_path / "em.zarr", texture((8, 32, 32)))
    cluster.join("freezes")
    path = cluster.yaml("em.zarr", "sr.zarr", network__name="nearest", work__requests_per_second={"write": 4})
    run = [sys.executable, "-m", "pipeline.run", str(path)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(run, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if '"event": "cluster"' in line:
                os.kill(cluster.pids["freezes"], signal.SIGSTOP)
            if "nothing was heard of" in line:
                os.kill(cluster.pids["freezes"], signal.SIGCONT)
                break
        else:
            raise AssertionError("the run ended without the line")
        process.communicate()
        assert process.returncode == 0


def test_workers_that_dasks_profiler_may_stop_are_named(tmp_path: Path, cluster: Cluster) -> None:
    """Before Python 3.12 it can. `cluster.tune` switches it off. Here it looks once an hour, and stops nothing."""
    write_lr(tmp_path / "em.zarr", texture((1, 16, 16)))
    profiled = {
        "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "True",
        "DASK_DISTRIBUTED__WORKER__PROFILE__INTERVAL": "1h",
    }
    cluster.join("profiled", **profiled)  # type: ignore[arg-type]
    old = sys.version_info < (3, 12)
    warning = f"workers on {socket.gethostname()} run Dask's profiler"
    assert (warning in main_job(cluster.yaml("em.zarr", "a.zarr", network__name="nearest"), "run").stderr) == old
    there = {"kind": "address", "address": cluster.address, "tune": True}
    tuned = volume_yaml(tmp_path / "b.yaml", tmp_path / "em.zarr", tmp_path / "b.zarr", cluster=there)
    assert warning not in main_job(tuned, "run").stderr


def test_a_target_begun_by_another_plan_while_a_run_waited_for_workers(tmp_path: Path, cluster: Cluster) -> None:
    """The place was empty when the run looked; workers of a batch system may come hours later."""
    write_lr(tmp_path / "em.zarr", texture((2, 32, 32)))
    late = cluster.yaml("em.zarr", "sr.zarr", network__name="nearest")
    run = [sys.executable, "-m", "pipeline.run", str(late)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(run, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as waiting:
        wait_until(lambda: list((tmp_path / "sr.zarr.emsr").glob("token-*")))
        run_here(volume_yaml(tmp_path / "first.yaml", tmp_path / "em.zarr", tmp_path / "sr.zarr"))
        before = tree(tmp_path / "sr.zarr"), (tmp_path / "sr.zarr.emsr/plan.json").read_bytes()
        cluster.join("late")
        _, said = waiting.communicate()
        assert waiting.returncode == 2, said
    assert "begun with another plan" in said
    assert (tree(tmp_path / "sr.zarr"), (tmp_path / "sr.zarr.emsr/plan.json").read_bytes()) == before


def kind_of(kinds: dict[str, Any], cluster: Cluster) -> Any:
    """The kind of a worker that was set aside: its process is that kind's, and the reason says so."""

    def kind(item: tuple[str, str]) -> str:
        who, why = item
        name = next(name for name, pid in cluster.pids.items() if who.endswith(f"process {pid}"))
        assert name in why, (name, why)
        return name

    return kind


def test_where_all_workers_see_one_fault_it_is_one_message(tmp_path: Path, cluster: Cluster) -> None:
    """The target's disk is theirs alone: exit code 2, one line, nothing left on either side, not even a folder."""
    needs_mounts()
    (tmp_path / "out").mkdir()
    write_lr(tmp_path / "em.zarr", texture((4, 32, 32)))
    for name in ("one", "two"):
        cluster.join(name, in_a_view_of_its_own(f"mount -t tmpfs none {tmp_path}/out"))
    cluster.wait_for(2)
    said = main_job(cluster.yaml("em.zarr", "out/deep/sr.zarr"), "run", check=False)
    assert said.returncode == 2, said.stderr
    last = said.stderr.strip().splitlines()[-1]
    assert "is not the client's" in last
    assert "and 1 more, likewise" in last
    assert f"process {cluster.pids['one']}" in said.stderr
    assert f"process {cluster.pids['two']}" in said.stderr
    assert not list((tmp_path / "out").iterdir())
    for name in ("one", "two"):
        assert not os.listdir(f"/proc/{cluster.pids[name]}/root{tmp_path}/out")


def test_bad_workers_that_come_late_are_set_aside(tmp_path: Path, cluster: Cluster) -> None:
    """They join while the run goes on: one of another commit, one whose target is a disk of its own.

    The only good worker is stopped until both are set aside, so that the run goes on for as long, and they get leases.
    """
    needs_mounts()
    (tmp_path / "out").mkdir()
    write_lr(tmp_path / "em.zarr", texture(SHAPE))
    cluster.join("good")
    cluster.wait_for(1)
    path = cluster.yaml("em.zarr", "out/sr.zarr", work__requests_per_second={"write": 20})
    command = [sys.executable, "-m", "pipeline.run", str(path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as client:
        wait_until((tmp_path / "out/sr.zarr/0/c").exists)
        os.kill(cluster.pids["good"], signal.SIGSTOP)
        cluster.join("other", PYTHONPATH=str(other_commit(tmp_path / "other")))
        cluster.join("alone", in_a_view_of_its_own(f"mount -t tmpfs none {tmp_path}/out"))
        assert client.stderr is not None
        lines, told = [], 0
        while told < 2 and (line := client.stderr.readline()):
            lines.append(line)
            told += '"event": "set_aside"' in line
        os.kill(cluster.pids["good"], signal.SIGCONT)
        _, rest = client.communicate(timeout=1200)
    said = "".join([*lines, rest])
    assert client.returncode == 0, said
    found = aside(tmp_path, "out/sr.zarr")
    assert {int(who.rpartition(" ")[2]) for who in found} == {cluster.pids["other"], cluster.pids["alone"]}
    voxels = np.asarray(zarr.open_array(tmp_path / "out/sr.zarr/0", mode="r"))
    np.testing.assert_array_equal(voxels, reference(tmp_path, path, "by-itself.zarr"))


@pytest.mark.parametrize(
    ("missing", "reason"),
    [("emsr", "`import emsr` finds"), ("pipeline/schedule/results.py", "No module named 'pipeline.schedule.results'")],
)
def test_a_worker_that_cannot_read_the_question_is_set_aside(
    tmp_path: Path, cluster: Cluster, missing: str, reason: str
) -> None:
    """Its emsr is half there, or of a version in which things have other names. It stays in the cluster, for others."""
    write_lr(tmp_path / "lr.zarr", texture((4, 32, 32)))
    other = other_commit(tmp_path / "other")
    if (other / missing).is_dir():
        shutil.rmtree(other / missing)
    else:
        (other / missing).unlink()
    cluster.join("good")
    cluster.join("bad", PYTHONPATH=str(other))
    cluster.wait_for(2)
    main_job(cluster.yaml("lr.zarr", "sr.zarr"), "run")
    (why,) = aside(tmp_path, "sr.zarr").values()
    assert f"it cannot do what this emsr asks: {reason}" in why
    cluster.wait_for(2)


def test_other_libraries_only_where_the_file_allows_it(tmp_path: Path, cluster: Cluster) -> None:
    """Two workers with two versions of numpy: refused with both named, unless cluster.mixed; then both are recorded."""
    other = tmp_path / "other/numpy-9.9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n")
    write_lr(tmp_path / "em.zarr", texture((4, 32, 32)))
    cluster.join("one")
    cluster.join("two", PYTHONPATH=f"{other.parent}:{REPOSITORY}")
    cluster.wait_for(2)
    path = cluster.yaml("em.zarr", "sr.zarr")
    said = main_job(path, "run", check=False)
    assert said.returncode == 2, said.stderr
    assert "numpy 9.9.9" in said.stderr
    assert all(f"process {cluster.pids[name]}" in said.stderr for name in ("one", "two"))
    assert not (tmp_path / "sr.zarr.emsr").exists()
    body = yaml.safe_load(path.read_text())
    body["cluster"]["mixed"] = True
    path.write_text(yaml.safe_dump(body))
    main_job(path, "run")
    crew = json.loads((tmp_path / "sr.zarr.emsr/crew.json").read_text())
    assert sorted("numpy 9.9.9" in entry["libraries"] for entry in crew) == [False, True]


def test_a_run_whose_objects_are_not_there_is_not_done(tmp_path: Path) -> None:
    """What each worker wrote last is looked for in the end; here somebody has deleted it meanwhile."""
    source = write_lr(tmp_path / "em.zarr", texture((4, 32, 32)))
    job = run_here(volume_yaml(tmp_path / "v.yaml", source, tmp_path / "sr.zarr"))
    run = RunState(job, Ledger(Store(f"file://{tmp_path}/ledger"), job.digest, job.plan.tasks, "r"))
    for receipt in process_lease(job, 0, job.plan.tasks).receipts:
        run.totals.add_receipt(receipt)
    assert look_for(run) == []
    last = next(iter(run.totals.last_written.values()))
    key = object_keys(open_target(job.target), job.plan, last.index)[0]
    kept = (tmp_path / "sr.zarr" / key).read_bytes()
    (tmp_path / "sr.zarr" / key).write_bytes(kept[:-1] + b"?")
    assert "stored bytes differ" in look_for(run)[0]
    (tmp_path / "sr.zarr" / key).unlink()
    (line,) = look_for(run)
    assert f"{key} is missing" in line
    assert last.worker in line
