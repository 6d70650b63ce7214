"""Processes of a run that faults are done to: its local workers, or a scheduler and workers apart."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence

import psutil
from conftest import REPOSITORY, TESTS
from fault_scene import FLUSH_S, Scene

Process = subprocess.Popen[bytes]


def workers(client: subprocess.Popen[str]) -> list[psutil.Process]:
    """The local workers of a run."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(client.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found += [process] if "spawn_main" in " ".join(process.cmdline()) else []
    return found


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def own_mounts(script: str) -> list[str]:
    """The beginning of a command whose process sees other mounts, those that `script` makes."""
    return ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh"]


@contextlib.contextmanager
def cluster(
    scene: Scene, *more: tuple[Sequence[str], dict[str, str]], good: int = 2
) -> Iterator[tuple[Process, list[Process]]]:
    """This starts a scheduler and nannies in processes of their own, and writes a volume.yaml that names them.

    Before the good ones come workers of `more`: how their command begins, and what their environment has besides.
    """
    place = scene.folder / "scheduler.json"
    environ = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
        "FAULT_LOG": str(scene.log),
        "FAULT_FLUSH_S": str(FLUSH_S),
        **scene.environ,
    }
    # In a folder without modules: Python would import those before PYTHONPATH's.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True, "cwd": scene.folder}
    dask = [sys.executable, "-m", "dask"]
    scheduler = [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    worker = [*dask, "worker", "--scheduler-file", str(place), "--nthreads", "2", "--no-dashboard"]
    worker += ["--memory-limit", "0", "--preload", str(TESTS / "run_faults.py")]
    started: list[Process] = []
    try:
        started.append(subprocess.Popen([*scheduler, "--scheduler-file", str(place)], env=environ, **quiet))
        scene.wait(lambda: place.exists() and place.read_text().endswith("}"), "the scheduler does not start")
        address = json.loads(place.read_text())["address"]
        for before, other in [*more, *[((), {})] * good]:
            started.append(subprocess.Popen([*before, *worker], env=environ | other, **quiet))
        scene.write(cluster={"kind": "address", "address": address, "tune": True})
        _wait_for(address, len(more) + good)
        yield started[0], started[1:]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        scene.write()  # what is looked at afterwards needs no cluster that is gone


def _wait_for(address: str, count: int) -> None:
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=120)
