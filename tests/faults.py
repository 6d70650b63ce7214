"""Each fault is done to real processes, files or servers of the main job, and says what the commands must answer."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import fault_servers
import psutil
from conftest import REPOSITORY, TESTS, volume_yaml
from fault_scene import FLUSH_S, Scene, undisturbed

from pipeline.plan.receipt import PENDING, QUARANTINED
from pipeline.prepare import recorded

FAKETIME = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")


def _workers(client: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(client.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found += [process] if "spawn_main" in " ".join(process.cmdline()) else []
    return found


# --- processes --------------------------------------------------------------------------------------------------------


def kill_workers(scene: Scene) -> None:
    """Up to three workers are killed, one after another, under way; the run goes on by itself."""
    scene.write(cluster__workers=2)
    with scene.command("run", str(scene.yaml)) as client:
        for _ in range(scene.rng.randint(1, 3)):
            if scene.under_way(client) and (workers := _workers(client)):
                _kill(scene.rng.choice(workers).pid)
        code, said = scene.end(client)
    assert code == 0, said


def kill_client(scene: Scene) -> None:
    """The client is killed, and with it scheduler and nannies, which live in it; the next run goes on."""
    scene.write(cluster__workers=scene.rng.randint(1, 2))
    with scene.command("run", str(scene.yaml)) as client:
        scene.under_way(client)
        when = time.monotonic()
        _kill(client.pid)
        scene.end(client)
    scene.crash(when)


def kill_everything(scene: Scene) -> None:
    """All processes are killed at once, as when the machine goes down."""
    scene.write()
    with scene.command("run", str(scene.yaml)) as client:
        scene.under_way(client)
        when = time.monotonic()
        os.killpg(client.pid, signal.SIGKILL)
        scene.end(client)
    scene.crash(when)


def kill_nanny(scene: Scene) -> None:
    """One of two nannies of a cluster apart is killed: its worker ends with it, the other one does the rest."""
    with _cluster(scene) as (_, nannies), scene.command("run", str(scene.yaml)) as client:
        if scene.under_way(client):
            _kill(nannies[0].pid)
        code, said = scene.end(client)
    assert code == 0, said


def kill_scheduler(scene: Scene) -> None:
    """The scheduler of a cluster apart is killed: the run ends with one message, the next one goes on elsewhere."""
    with _cluster(scene) as (scheduler, _), scene.command("run", str(scene.yaml)) as client:
        alive = scene.under_way(client)
        when = time.monotonic()
        _kill(scheduler.pid)
        code, said = scene.end(client)
        assert code == 0 if not alive else code in (0, 2), said
    scene.write()
    scene.crash(when)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _cluster(scene: Scene) -> Iterator[tuple[subprocess.Popen[bytes], list[subprocess.Popen[bytes]]]]:
    """This starts a scheduler and two nannies in processes of their own, and writes a volume.yaml that names them."""
    place = scene.folder / "scheduler.json"
    environ = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
        "FAULT_LOG": str(scene.log),
        "FAULT_FLUSH_S": str(FLUSH_S),
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environ, "start_new_session": True}
    dask = [sys.executable, "-m", "dask"]
    worker = [
        *dask,
        "worker",
        "--scheduler-file",
        str(place),
        "--nthreads",
        "2",
        "--no-dashboard",
        "--preload",
        str(TESTS / "run_faults.py"),
    ]
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(
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
            )
        )  # type: ignore[call-overload]
        started += [subprocess.Popen(worker, **quiet) for _ in range(2)]  # type: ignore[call-overload]
        scene.wait(lambda: place.exists() and place.read_text().endswith("}"), "the scheduler does not start")
        scene.write(cluster={"kind": "address", "address": json.loads(place.read_text())["address"], "tune": True})
        yield started[0], started[1:]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def two_clients(scene: Scene) -> None:
    """A second run is refused while the first lives, and takes over when it has been killed."""
    scene.write()
    hold = scene.folder / "hold"
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.5", STANDIN_HOLD=str(hold)) as first:
        scene.under_way(first)
        hold.touch()
        scene.run(2, "another run")
        assert first.poll() is None, "the first one ended too early for this test"
        when = time.monotonic()
        _kill(first.pid)
        scene.end(first)
    scene.crash(when)


# --- slabs ------------------------------------------------------------------------------------------------------------


def _bad_slab(kind: str, words: str) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        scene.write(work__stall_s=15, work__retries=1)
        task_number = str(scene.rng.randrange(4))
        scene.run(1, words, FAULT_TASK=task_number, FAULT_KIND=kind, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1")
        found = recorded.read(scene.place.as_uri(), "harness")
        assert found is not None
        assert list(found.ledger.indices(QUARANTINED)) == [int(task_number)], "that slab and no other"
        assert not found.ledger.count(PENDING, range(found.slabs)), "the rest is finished"
        mark = scene.log.stat().st_size
        scene.run()
        assert {task for task, _ in scene.lines("begin", mark)} == {int(task_number)}, (
            "mended, the same command repeats it alone"
        )

    return fault


slab_fails = _bad_slab("fail", "this slab always fails")
slab_fails.__doc__ = "One slab always raises: it is quarantined, the rest finishes, the same command repeats it."
slab_hangs = _bad_slab("hang", "no progress for 15 s")
slab_hangs.__doc__ = "One slab hangs while it holds the device: it is given up after work.stall_s, its worker replaced."
slab_exhausts_memory = _bad_slab("exhaust", "its worker died on every try")
slab_exhausts_memory.__doc__ = "One slab allocates until its worker is killed, on every try."


# --- storage ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(scene: Scene, size: int) -> Iterator[Callable[[str], None]]:
    """The target lies on a tmpfs of its own; this yields a function that remounts it with other options."""
    place = scene.folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
    scene.disk = place
    try:
        yield lambda options: scene.wait(
            lambda: (
                subprocess.run(["mount", "-o", f"remount,{options}", str(place)], stderr=subprocess.DEVNULL).returncode
                == 0
            ),
            "busy",
        )
        scene.check()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        scene.disk = None
        shutil.copytree(scene.undisturbed / "sr", scene.folder / "sr", dirs_exist_ok=True)
        shutil.copytree(scene.undisturbed / "sr.emsr", scene.folder / "sr.emsr", dirs_exist_ok=True)


def full_disk(scene: Scene) -> None:
    """The target's disk fills up: the run ends with one message; with more space the next one goes on."""
    needed = sum(f.stat().st_size for f in (scene.undisturbed / "sr").rglob("*") if f.is_file())
    with _disk(scene, max(300_000, int(needed * scene.rng.uniform(0.3, 0.8)))) as remount:
        scene.write()
        scene.run(2, "no space left")
        remount(f"size={10 * needed + 10_000_000}")
        scene.crash(scene.last_ended())


def read_only(scene: Scene) -> None:
    """The target's disk becomes read-only under way: the run ends with one message; writable again, it goes on."""
    with _disk(scene, 1 << 30) as remount:
        scene.write()
        with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as client:
            if scene.under_way(client):
                remount("ro")
            code, said = scene.end(client)
        assert code == 0 or (code == 2 and "permission denied" in said), said
        remount("rw")
        scene.crash(scene.last_ended())


def damaged_shard(scene: Scene) -> None:
    """Stored objects are changed, cut off or lost after a run: verify finds each, --requeue and run repair them."""
    _finished(scene)
    objects = [
        f
        for f in sorted((scene.folder / "sr").rglob("*"))
        if f.is_file() and "c" in f.relative_to(scene.folder / "sr").parts
    ]
    for victim in scene.rng.sample(objects, scene.rng.randint(1, 3)):
        data = bytearray(victim.read_bytes())
        kind = scene.rng.choice(["flip", "cut", "lose"])
        if kind == "flip":
            data[scene.rng.randrange(len(data))] ^= 1 << scene.rng.randrange(8)
        victim.write_bytes(data if kind == "flip" else data[: scene.rng.randrange(len(data))])
        if kind == "lose":
            victim.unlink()
    with scene.command("verify", str(scene.yaml), "--requeue") as command:
        code, said = scene.end(command)
    assert code == 1, said
    damaged = {int(line.split()[2].rstrip(":")) for line in said.splitlines() if line.startswith("damaged")}
    assert damaged, said
    mark = scene.log.stat().st_size if scene.log.exists() else 0
    scene.run()
    assert {task for task, _ in scene.lines("begin", mark)} <= damaged


def damaged_ledger(scene: Scene) -> None:
    """A segment of the ledger is changed or lost: its tasks are made again, to the same bytes."""
    _finished(scene)
    victim = scene.rng.choice(sorted((scene.folder / "sr.emsr").rglob("segment-*")))
    data = bytearray(victim.read_bytes())
    data[scene.rng.randrange(len(data))] ^= 1
    victim.write_bytes(data)
    if scene.rng.random() < 0.5:
        victim.unlink()
    scene.run()


def source_changed(scene: Scene) -> None:
    """The source's metadata change under way: a worker that opens it then ends the run, and the next run is refused.

    Once they are restored a third run goes on.
    """
    place = scene.folder / "own"
    place.mkdir()
    scene.source, scene.keys = undisturbed(place, None)
    scene.undisturbed = place
    scene.write()
    document = Path(scene.source) / "0" / "zarr.json"
    before = document.read_bytes()
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.2") as client:
        alive = scene.under_way(client)
        document.write_bytes(before.replace(b'"fill_value": 0', b'"fill_value": 7'))
        if workers := _workers(client):
            _kill(workers[0].pid)
        code, said = scene.end(client)
    assert not alive or (code == 1 and "changed while the run was going on" in said), said
    scene.run(2, "fingerprint was")
    document.write_bytes(before)
    scene.crash(scene.last_ended())


def _finished(scene: Scene) -> None:
    """The undisturbed target and its ledger are copied, as where a run has already been."""
    scene.write()
    for name in ("sr", "sr.emsr"):
        shutil.copytree(scene.undisturbed / name, scene.folder / name)


# --- servers and clocks -----------------------------------------------------------------------------------------------


def failing_s3(scene: Scene) -> None:
    """A third of the requests to S3 fails by 500, 503, 429, a cut or silence, whether carried out or not."""
    with fault_servers.s3(seed=scene.rng.randrange(1 << 30)) as gateway:
        environ = fault_servers.s3_environment(gateway)
        environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "2"  # so silence of gateway.silence_s is given up
        client = boto3.client(
            "s3",
            endpoint_url=gateway.url,
            region_name="us-east-1",
            aws_access_key_id="nobody",
            aws_secret_access_key="nothing",
        )
        client.create_bucket(Bucket="brain")
        source = Path(scene.source)
        for file in source.rglob("*"):
            if file.is_file():
                client.put_object(Bucket="brain", Key=f"in/{file.relative_to(source)}", Body=file.read_bytes())
        gateway.share = 1 / 3
        volume_yaml(scene.yaml, "s3://brain/in", "s3://brain/out", **scene.keys)
        code, said = 2, ""
        for _ in range(5):  # a command may give up, with a message; the next one goes on
            with scene.command("run", str(scene.yaml), **environ) as command:
                code, said = scene.end(command)
            if code == 0:
                break
        gateway.share = 0
        assert code == 0, said
        assert set(gateway.requests) >= {*fault_servers.KINDS}, gateway.requests
        for item in (
            client.get_paginator("list_objects_v2").paginate(Bucket="brain", Prefix="out").search("Contents[].Key")
        ):
            file = (
                scene.folder / "sr" / item.removeprefix("out/")
                if item.startswith("out/")
                else scene.folder / "sr.emsr" / item.removeprefix("out.emsr/")
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(client.get_object(Bucket="brain", Key=item)["Body"].read())
        for name in ("zarr.json", "fidelity/zarr.json"):  # they name the source, which is another one here
            shutil.copy(scene.undisturbed / "sr" / name, scene.folder / "sr" / name)


def clock_jumps(scene: Scene) -> None:
    """The clock of all processes jumps under way: forward by hours, back by a minute.

    tensorstore's thread pool waits by the time of day, so that a clock set back holds it up for as long.
    `pipeline.cluster.steady_clock` spares what Dask would wait.
    """
    scene.write()
    clock = scene.folder / "clock"
    clock.write_text("+0s")
    # Only what tells the time of day jumps, as when a real clock is set.
    environ = {
        "LD_PRELOAD": FAKETIME[0],
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.05", **environ) as client:
        for _ in range(3):
            if scene.under_way(client):
                clock.write_text(f"{scene.rng.choice((-60, -5, 60, 9000)):+d}s")
        code, said = scene.end(client)
    assert code == 0, said


FAULTS: dict[str, Callable[[Scene], None]] = {
    "kill-workers": kill_workers,
    "kill-client": kill_client,
    "kill-everything": kill_everything,
    "kill-nanny": kill_nanny,
    "kill-scheduler": kill_scheduler,
    "two-clients": two_clients,
    "slab-fails": slab_fails,
    "slab-hangs": slab_hangs,
    "slab-exhausts-memory": slab_exhausts_memory,
    "full-disk": full_disk,
    "read-only": read_only,
    "damaged-shard": damaged_shard,
    "damaged-ledger": damaged_ledger,
    "source-changed": source_changed,
    "failing-s3": failing_s3,
    "clock-jumps": clock_jumps,
}


def lacks(name: str) -> str:
    """The result says what this machine lacks for a fault; it is empty where the fault can be done."""
    if name in ("full-disk", "read-only") and os.geteuid() != 0:
        return "mounting needs root"
    if name == "clock-jumps" and not FAKETIME:
        return "libfaketime is not installed"
    return ""


def do(name: str, scene: Scene) -> None:
    """One fault is done, and AssertionError names what does not hold after it."""
    FAULTS[name](scene)
    scene.check()
