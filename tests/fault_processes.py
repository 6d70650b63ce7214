"""Faults of processes: killed, stopped, signalled, limited, without streams."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time

from fault_cluster import cluster, kill, workers
from fault_scene import Scene, hold


def kill_workers(scene: Scene) -> None:
    """Up to three workers are killed, one after another, under way; the run goes on by itself."""
    scene.write(cluster__workers=2)
    with scene.command("run", str(scene.yaml)) as client:
        for _ in range(scene.rng.randint(1, 3)):
            if scene.under_way(client) and (found := workers(client)):
                kill(scene.rng.choice(found).pid)
        code, said = scene.end(client)
    hold(code == 0, "wrong answer", said)


def kill_client(scene: Scene) -> None:
    """The client is killed, and with it scheduler and nannies, which live in it; the next run goes on."""
    scene.write(cluster__workers=scene.rng.randint(1, 2))
    with scene.command("run", str(scene.yaml)) as client:
        scene.under_way(client)
        when = time.monotonic()
        kill(client.pid)
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
    with cluster(scene) as (_, nannies), scene.command("run", str(scene.yaml)) as client:
        if scene.under_way(client):
            kill(nannies[0].pid)
        code, said = scene.end(client)
    hold(code == 0, "wrong answer", said)


def kill_scheduler(scene: Scene) -> None:
    """The scheduler of a cluster apart is killed: the run ends with one message, the next one goes on elsewhere."""
    with cluster(scene) as (scheduler, _), scene.command("run", str(scene.yaml)) as client:
        alive = scene.under_way(client)
        when = time.monotonic()
        kill(scheduler.pid)
        code, said = scene.end(client)
        hold(code == 0 if not alive else code in (0, 2), "wrong answer", said)
    scene.write()
    scene.crash(when)


def scheduler_stops_for_a_while(scene: Scene) -> None:
    """The scheduler of a cluster apart is stopped for some seconds: everything waits, and goes on."""
    with cluster(scene) as (scheduler, _), scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.05") as client:
        if scene.under_way(client):
            kill(scheduler.pid, signal.SIGSTOP)
            time.sleep(scene.rng.uniform(1, 8))
            kill(scheduler.pid, signal.SIGCONT)
        code, said = scene.end(client)
    hold(code == 0, "wrong answer", said)


def worker_stops_for_a_while(scene: Scene) -> None:
    """One of two workers is suspended for some seconds, as when its machine or network stands still."""
    scene.write(cluster__workers=2)
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.05") as client:
        if scene.under_way(client) and (found := workers(client)):
            kill(found[0].pid, signal.SIGSTOP)
            time.sleep(scene.rng.uniform(1, 10))
            kill(found[0].pid, signal.SIGCONT)
        code, said = scene.end(client)
    hold(code == 0, "wrong answer", said)


def worker_stops_for_good(scene: Scene) -> None:
    """One of two workers is suspended and never goes on; Dask replaces it after its time to live."""
    scene.write(cluster__workers=2)
    ttl = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "15s"}
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.05", **ttl) as client:
        if scene.under_way(client) and (found := workers(client)):
            kill(found[0].pid, signal.SIGSTOP)
        code, said = scene.end(client)
    hold(code == 0, "wrong answer", said)


def workers_end_by_lifetime(scene: Scene) -> None:
    """A site's Dask configuration gives workers a lifetime: others come, and the run ends."""
    scene.write(cluster__workers=2)
    life = {"DASK_DISTRIBUTED__WORKER__LIFETIME__DURATION": "8s", "DASK_DISTRIBUTED__WORKER__LIFETIME__STAGGER": "2s"}
    scene.run(STANDIN_DELAY_S="0.1", **life)


def terminal_ends(scene: Scene) -> None:
    """SIGHUP reaches all processes of the terminal: the run drains, and the next one goes on."""
    _drains(scene, signal.SIGHUP, group=True)


def asked_to_end(scene: Scene) -> None:
    """SIGTERM or SIGINT, to the client or to all its processes: the run drains, and the next one goes on."""
    _drains(scene, scene.rng.choice([signal.SIGTERM, signal.SIGINT]), group=scene.rng.random() < 0.5)


def asked_twice(scene: Scene) -> None:
    """The second SIGTERM ends at once."""
    scene.write()
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as client:
        if scene.under_way(client):
            for _ in range(2):
                client.send_signal(signal.SIGTERM)
                time.sleep(scene.rng.uniform(0.05, 0.5))
        code, said = scene.end(client)
    scene.was_asked_to_end(code, said)
    scene.crash(scene.last_ended())


def asked_early(scene: Scene) -> None:
    """SIGTERM comes while the run begins, wherever that is."""
    scene.write()
    with scene.command("run", str(scene.yaml)) as client:
        time.sleep(scene.rng.uniform(0.2, 8))
        client.send_signal(signal.SIGTERM)
        code, said = scene.end(client)
    hold(code in (0, 130, -signal.SIGTERM), "wrong answer", f"{code}: {said}")
    scene.run()


def _drains(scene: Scene, number: int, group: bool) -> None:
    scene.write()
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as client:
        if scene.under_way(client):
            (os.killpg if group else os.kill)(client.pid, number)
        code, said = scene.end(client)
    scene.was_asked_to_end(code, said)
    scene.crash(scene.last_ended())


def nobody_listens(scene: Scene) -> None:
    """Standard streams are closed, full, or lose their reader: the run does its work."""
    scene.write()
    kind = scene.rng.choice(["closed", "full", "pipe"])
    if kind == "closed":
        scene.run(streams={"stdout": None, "stderr": None}, prepare=lambda: [os.close(n) for n in (0, 1, 2)])
    elif kind == "full":
        with open("/dev/full", "w") as full:
            scene.run(streams={"stdout": full, "stderr": full})
    else:
        reader, writer = os.pipe()
        os.close(reader)
        scene.run(streams={"stdout": writer, "stderr": subprocess.STDOUT})
        os.close(writer)


def small_files_only(scene: Scene) -> None:
    """A limit on the size of files ends the run at its first slab, without quarantine; without it the next goes on."""
    scene.write()
    limit = scene.rng.choice([2048, 4096])
    said = scene.run(2, "ulimit -f", prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    hold("quarantined" not in said.replace('"quarantined": 0', ""), "wrong answer", said)
    scene.run()


def few_files_open(scene: Scene) -> None:
    """Hardly any file may be opened: the run says so, or ends well; without the limit the next one goes on."""
    scene.write()
    limit = scene.rng.randint(16, 48)
    scene.answer("run", want=(0, 2), prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    scene.run()


def few_requests_a_second(scene: Scene) -> None:
    """A bound on requests makes slabs wait longer than work.stall_s: none is taken for stalled."""
    scene.write(work__requests_per_second={"write": 2}, work__stall_s=3, work__in_flight=2)
    scene.run()
