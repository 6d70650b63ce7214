"""Whatever waits says what it waits for, and nothing waits for ever: disks, servers, schedulers, workers that hang."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, texture, tree, volume_yaml, wait_until, write_lr
from distributed import Client
from PIL import Image
from test_clusters import SMALL, dask, scheduler

from pipeline.base import waits
from pipeline.base.errors import NoAnswerError
from pipeline.cluster import batch
from pipeline.cluster.batch_systems import SYSTEMS
from pipeline.cluster.job_replacer import JobReplacer
from pipeline.cluster.job_submitter import JobSubmitter
from pipeline.storage.kv import Store

IMPATIENT = str(TESTS / "run_impatient.py")


def start(command: str, *args: str | Path, **environ: str) -> subprocess.Popen[str]:
    """A command of emsr that says a wait after a second and ends it after four."""
    return subprocess.Popen(
        [sys.executable, IMPATIENT, command, *map(str, args)],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}", **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code, and what it said on stderr."""
    try:
        _, said = process.communicate(timeout=GUARD_S)
    finally:
        process.kill()
    return process.returncode, said


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """HOST:PORT of a socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """HOST:PORT that does not even take connections: those it has room for are taken already."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            full = stack.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


class Mortal(http.server.ThreadingHTTPServer):
    """A web server of a folder; after `kill` it takes requests and answers none."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        server = self
        server.dead = threading.Event()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                if server.dead.is_set():
                    threading.Event().wait(GUARD_S)
                super().do_GET()

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lr(tmp_path / "lr.zarr", texture((6, 40, 32)))


@pytest.mark.parametrize("place", ["lr.zarr", "lr.zarr/zarr.json", "lr.zarr/0/zarr.json", "sr.emsr/plan.json", "w.pth"])
def test_a_pipe_in_the_place_of_a_file_is_a_message(place: str, source: Path, tmp_path: Path) -> None:
    """Opening one waits for somebody who writes into it, for ever; sockets and devices are no files either."""
    path = tmp_path / place
    if path.exists():
        path.rename(tmp_path / "aside")
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    network = {"network": {"name": "gpemsr", "scale": 8, "weights": "w.pth"}} if place == "w.pth" else {}
    code, said = ended(start("run", volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **network)))
    assert code == 2, said
    assert str(path) in said
    assert "waiting" not in said


def test_a_volume_yaml_that_never_comes(tmp_path: Path) -> None:
    """A pipe is allowed there, `emsr run <(make-volume)`, if something comes out of it."""
    os.mkfifo(tmp_path / "v.yaml")
    code, said = ended(start("run", tmp_path / "v.yaml"))
    assert code == 2, said
    assert f"waiting for {tmp_path}/v.yaml" in said
    assert "no answer in 4 s" in said


@pytest.mark.parametrize("server", [silent_server, black_hole])
@pytest.mark.parametrize("arguments", [("run",), ("run", "--dry-run"), ("view", "--state")])
def test_a_source_whose_server_is_silent(arguments: tuple[str, ...], server: object, tmp_path: Path) -> None:
    command, *flags = arguments
    with server() as address:  # type: ignore[operator]
        path = volume_yaml(tmp_path / "v.yaml", f"http://{address}/lr.zarr", "sr")
        code, said = ended(start(command, path, *flags))
    assert code == 2, said
    assert f"waiting for http://{address}/lr.zarr" in said
    assert "no answer in 4 s" in said


@pytest.mark.parametrize("command", ["run", "status", "verify"])
def test_a_target_whose_server_is_silent(command: str, source: Path, tmp_path: Path) -> None:
    with silent_server() as address:
        environ = {"AWS_ENDPOINT_URL": f"http://{address}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        code, said = ended(start(command, volume_yaml(tmp_path / "v.yaml", "lr.zarr", "s3://brain/sr"), **environ))
    assert code == 2, said
    assert "waiting for s3://brain/sr.emsr/plan.json" in said
    assert "no answer in 4 s" in said


def test_a_folder_of_sections_that_hangs(tmp_path: Path) -> None:
    """convert reads files through Python; a pipe among them is no section."""
    (tmp_path / "sections").mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "sections" / "1.png")
    os.mkfifo(tmp_path / "stack.tif")
    code, said = ended(start("convert", tmp_path / "stack.tif", tmp_path / "out", "--voxel-size-nm", "45", "4", "4"))
    assert code == 2, said
    assert "is a pipe" in said


def test_ctrl_c_ends_a_command_that_waits(tmp_path: Path) -> None:
    with silent_server() as address:
        process = start("run", volume_yaml(tmp_path / "v.yaml", f"http://{address}/lr.zarr", "sr"))
        assert process.stderr is not None
        assert "waiting for" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        code, said = ended(process)
    assert code == 130, said


def test_a_thread_that_cannot_even_be_interrupted_ends_with_its_process() -> None:
    """As inside the system's call on a dead mount; here the signal is kept from it."""
    code = (
        "import signal, sys, threading; from pipeline.base import command, waits\n"
        "waits.SAY_S, waits.LIMIT_S, waits.END_S = 0.2, 0.5, 0.5\n"
        "def work():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "    with waits.waiting('a dead mount'):\n"
        "        threading.Event().wait()\n"
        "sys.exit(command.guarded(work))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=GUARD_S)
    assert done.returncode == 2
    assert "no answer in 0 s: a dead mount" in done.stderr


def test_a_command_ends_though_a_thread_of_it_never_will() -> None:
    """Python waits for the threads of a pool when it ends."""
    code = (
        "import sys, threading; from concurrent.futures import ThreadPoolExecutor\n"
        "from pipeline.base import command, waits\n"
        "waits.LIMIT_S, waits.END_S = 0.5, 0.5\n"
        "def work():\n"
        "    with ThreadPoolExecutor(1) as pool, waits.waiting('a section'):\n"
        "        pool.submit(threading.Event().wait).result()\n"
        "sys.exit(command.guarded(work))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=GUARD_S)
    assert done.returncode == 2, done.stderr


@pytest.mark.parametrize("ends", ["signal.raise_signal(signal.SIGINT)", "threading.Event().wait()"])
def test_a_program_that_has_called_a_command_goes_on_after_it(ends: str) -> None:
    """A notebook, say: its own process must not end half a minute after the command did."""
    code = (
        "import signal, sys, threading, time; from pipeline.base import command, waits\n"
        "waits.LIMIT_S, waits.END_S = 0.5, 0.5\n"
        "def work():\n"
        "    with waits.waiting('an answer'):\n"
        f"        {ends}\n"
        "print(command.guarded(work), flush=True)\n"
        "time.sleep(2)\n"
        "print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=GUARD_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1] == "still here"


def test_a_wait_that_was_given_up_and_did_not_matter_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contact sheet of a run, say: what comes after it answers, and the command goes on."""
    monkeypatch.setattr(waits, "LIMIT_S", 0.3)
    monkeypatch.setattr(waits, "LOOK_S", 0.05)
    with waits.watched_command():
        with pytest.raises(NoAnswerError, match="a picture"), waits.waiting("a picture"):
            threading.Event().wait(GUARD_S)
        assert waits.current.get().end is not None  # type: ignore[union-attr]
        with waits.waiting("the rest"):
            pass
        assert waits.current.get().end is None  # type: ignore[union-attr]


def test_steps_of_a_long_wait_are_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "LIMIT_S", 0.5)
    monkeypatch.setattr(waits, "LOOK_S", 0.05)
    with waits.watched_command(), waits.waiting("a large folder"):
        for _ in range(10):
            threading.Event().wait(0.1)
            waits.heartbeat()


def test_a_put_that_hangs_is_given_up_once_not_once_per_object() -> None:
    """Sixty-four objects would wait sixty-four times."""
    code = (
        "import sys; from pipeline.base import command, waits; from pipeline.storage.kv import Store\n"
        "waits.LIMIT_S, waits.END_S = 1.0, 60.0\n"
        "sys.exit(command.guarded(lambda: Store('s3://brain/sr').put_all({str(i): b'x' for i in range(64)})))"
    )
    with silent_server() as address:
        environ = {"AWS_ENDPOINT_URL": f"http://{address}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.count("no answer") == 1


def test_files_that_are_none(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as door:
        os.chdir(tmp_path)
        door.bind("door")
        with pytest.raises(Exception, match="is a socket"):
            store.get("door")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(Exception, match="is a device"):
        list(store.get_all(["zero"]))


def test_a_server_that_dies_in_the_middle_is_told(source: Path, tmp_path: Path) -> None:
    """Workers tell the client what they wait for; then it is one message and an end, not a quarantine of the volume."""
    server = Mortal(tmp_path)
    path = volume_yaml(
        tmp_path / "v.yaml",
        f"http://127.0.0.1:{server.server_port}/lr.zarr",
        "sr",
        network__name="nearest",
        work={"slab_shape": [2, 16, 16], "stall_s": 6, "requests_per_second": {"read": 2}},
    )
    process = start("run", path, WAIT_S="60")
    ledger = tmp_path / "sr.emsr"
    wait_until(lambda: list(ledger.glob("ledger-*/segment-*")) or process.poll() is not None)
    server.dead.set()
    code, said = ended(process)
    assert code == 2, said
    assert '"event": "waiting"' in said
    assert f"wait for http://127.0.0.1:{server.server_port}/lr.zarr/0 at voxels" in said
    assert "Traceback" not in said


def test_a_scheduler_that_stands_still(source: Path, tmp_path: Path) -> None:
    """Stopped, not ended: its connections stay open and nothing comes."""
    place = tmp_path / "scheduler.json"
    preload = ["--preload", str(TESTS / "run_standin.py")]
    hold = tmp_path / "hold"
    hold.touch()
    with dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(place)) as process:
        wait_until(lambda: place.exists() and place.read_text().endswith("}"))
        address = json.loads(place.read_text())["address"]
        join = ["worker", "--scheduler-file", str(place), "--nthreads", "1", "--no-nanny"]
        with dask(*join, *preload, STANDIN_HOLD=str(hold)):
            there = {"kind": "address", "address": address}
            client = start("run", volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=there), WAIT_S="20")
            wait_until(lambda: (tmp_path / "sr.emsr" / "lock.json").exists() or client.poll() is not None)
            process.send_signal(signal.SIGSTOP)
            code, said = ended(client)
    assert code == 2, said
    assert "waiting for the Dask scheduler" in said
    assert "Traceback" not in said


def test_a_scheduler_address_where_nobody_speaks_dask(source: Path, tmp_path: Path) -> None:
    with silent_server() as address:
        there = {"kind": "address", "address": f"tcp://{address}"}
        code, said = ended(start("run", volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=there)))
    assert code == 2, said
    assert f"waiting for the Dask scheduler at tcp://{address}" in said


def test_a_paused_worker_is_named_and_its_leases_go_to_another(source: Path, tmp_path: Path) -> None:
    """Dask pauses a worker that holds too much memory: what it was given would wait there for ever."""
    cramped = ["--memory-limit", "50MB"]
    with scheduler(tmp_path) as (address, join), dask(*join, *cramped):
        there = {"kind": "address", "address": address}
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=there)
        client = start("run", path, WAIT_S="60")
        assert client.stderr is not None
        lines = []
        while not any("begins nothing: Dask has paused it" in line for line in lines):
            lines.append(client.stderr.readline())
            assert lines[-1], lines
        with dask(*join):
            code, said = ended(client)
    assert code == 0, said
    assert "--memory-limit" in "".join(lines)


def test_where_all_workers_are_paused_the_run_ends(source: Path, tmp_path: Path) -> None:
    """By itself, naming the worker and its memory."""
    with scheduler(tmp_path) as (address, join), dask(*join, "--memory-limit", "50MB"):
        there = {"kind": "address", "address": address}
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=there)
        code, said = ended(start("run", path, WAIT_S="60"))
    assert code == 2, said
    assert "all workers were paused by Dask" in said
    assert "of 0.05 GiB" in said


def test_ctrl_c_ends_a_run_whose_workers_are_paused(source: Path, tmp_path: Path) -> None:
    """The first one: nothing is finished there that could be waited for. The run can be resumed."""
    hold = tmp_path / "hold"
    hold.touch()
    with scheduler(tmp_path) as (address, join):
        path = volume_yaml(
            tmp_path / "v.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": address}, **SMALL
        )
        preload = ["--preload", str(TESTS / "run_standin.py")]
        with dask(*join, *preload, STANDIN_HOLD=str(hold)), Client(address, set_as_default=False) as watch:
            watch.wait_for_workers(1)
            client = start("run", path, WAIT_S="60", STANDIN_HOLD=str(hold))
            wait_until(
                lambda: (
                    client.poll() is not None
                    or any(str(key).startswith("lease-") for keys in watch.processing().values() for key in keys)
                )
            )
            watch.run(lambda dask_worker: setattr(dask_worker.memory_manager, "memory_limit", 1))
            client.send_signal(signal.SIGINT)
            code, said = ended(client)
            hold.unlink()
        assert code == 130, said
        assert "Dask has paused it" in said
        with dask(*join, *preload):
            main_job(path)


def test_a_site_that_ends_workers_by_the_clock(source: Path, tmp_path: Path) -> None:
    """Dask's configuration may give workers a lifetime; those of a local cluster would leave and never come back."""
    small = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}
    main_job(volume_yaml(tmp_path / "plain.yaml", "lr.zarr", "undisturbed", **small))
    environ = {
        "DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION": "2 seconds",
        "DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT": "1 second",
        "STANDIN_DELAY_S": "0.2",
    }
    main_job(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **small), **environ)
    assert tree(tmp_path / "sr") == tree(tmp_path / "undisturbed")


def test_what_slurm_says_of_a_job_that_waits_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held or queued, by Slurm's own word; other jobs of the same user are not named."""
    (tmp_path / "squeue").write_text("#!/bin/sh\nprintf '12|PENDING|JobHeldUser\\n13|PENDING|Priority\\n'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ours = of_slurm("12")
    assert batch.why_none(ours) == "job 12 is PENDING (JobHeldUser)"
    assert "no job a number" in batch.why_none(of_slurm(None))
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm' >&2; exit 1\n")
    assert batch.why_none(ours) == "Slurm does not say what its jobs do"


def of_slurm(number: str | None) -> SimpleNamespace:
    """As much as `why_none` sees of a cluster with one job."""
    made = SimpleNamespace(workers={"0": SimpleNamespace(job_id=number)})
    made.replacing = JobReplacer(made, SYSTEMS["slurm"], JobSubmitter(SYSTEMS["slurm"], 1))
    return made
