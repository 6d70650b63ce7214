"""The simulator's model against a real run, and what it must do by arithmetic."""

from __future__ import annotations

import math
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from distributed import Client
from sleepy import job_of, sleep_and_put

sys.path.append(str(REPOSITORY / "benchmarks"))
from simulate import World, simulate

from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig
from pipeline.plan.plan import Plan
from pipeline.storage.kv import Store
from pipeline.storage.ledger import RECORD, Ledger

QUIET = World(
    workers=4,
    threads=1,
    arrival_s=0,
    task_s=10,
    spread=0,
    open_s=0,
    lease_s=0,
    lease_cost_s=0,
    slow_share=0,
    hang_s=math.inf,
    death_s=math.inf,
    store_per_s=math.inf,
)


def changed(**values: object) -> World:
    return World(**{**QUIET.__dict__, **values})  # type: ignore[arg-type]


def plan_of(columns: int, depth: int) -> Plan:
    return job_of("/nowhere", columns, depth).plan


def test_an_undisturbed_run_takes_tasks_over_threads() -> None:
    """400 tasks of 10 s on 4 threads: 1000 s, and nothing lost."""
    played = simulate(plan_of(40, 10), QUIET)
    assert (played.written, played.deaths, played.lost_s, played.twice_s) == (400, 0, 0, 0)
    assert played.useful_s == pytest.approx(4000)
    assert 1000 <= played.wall_s < 1025
    assert (played.reads, played.writes) == (400 * QUIET.reads, 400 * QUIET.writes)


def test_the_dead_lose_their_leases_and_others_do_them() -> None:
    played = simulate(plan_of(40, 10), changed(death_s=500, back_s=50))
    assert played.written == 400
    assert played.deaths > 0
    assert 0 < played.lost_s <= played.deaths * 40, "at most the leases that ran"
    assert played.wall_s > 1000


def test_a_thread_that_hangs_is_not_waited_for() -> None:
    """One of two hundred tasks hangs, about: without second starts the run would not end."""
    played = simulate(plan_of(40, 10), changed(workers=16, hang_s=2000), seed=1)
    assert played.written == 400
    assert played.started_again >= 1


def test_a_store_that_refuses_slows_the_run_and_a_budget_avoids_the_refusals() -> None:
    """4 workers write 4 * 10 objects in 10 s; the store takes half of that for an hour."""
    busy = {"writes": 10, "store_per_s": 2, "doubling_s": 1e9}
    refused = simulate(plan_of(40, 10), changed(**busy))
    paced = simulate(plan_of(40, 10), changed(**busy, budget_writes=2))
    assert refused.refused > 0
    assert paced.refused == 0
    for played in (refused, paced):
        assert 1.7 * 1000 < played.wall_s < 2.3 * 1000


def test_the_model_predicts_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real workers, scheduler and ledger: a short run tells what a task and a lease take here, a run of three times its tasks is
    predicted from that within a factor of 1.5.
    """
    monkeypatch.setenv("TASK_S", "0.25")
    with connect(ClusterConfig(workers=2), 2) as client:
        seconds_of_all, wall, leases = real_run(client, tmp_path / "short", 8)
        lease_s = max(0.0, 4 * wall - seconds_of_all) / leases
        _, wall, _ = real_run(client, tmp_path / "long", 24)
    played = simulate(
        plan_of(24, 10), changed(workers=2, threads=2, task_s=seconds_of_all / 80, lease_s=lease_s, open_s=lease_s)
    )
    assert played.wall_s / 1.5 < wall < 1.5 * played.wall_s


def real_run(client: Client, folder: Path, columns: int) -> tuple[float, float, int]:
    """(seconds of all tasks, wall seconds, leases) of a run of 10 tasks a column."""
    job = job_of(str(folder / "sr"), columns, 10)
    ledger = Ledger(Store(f"file://{folder / 'ledger'}"), job.digest, job.plan.tasks, "r")
    began = time.monotonic()
    assert drive(client, job, ledger, threading.Event(), work=sleep_and_put).written == job.plan.tasks
    wall = time.monotonic() - began
    segments = [np.frombuffer(f.read_bytes(), RECORD, offset=12) for f in (folder / "ledger").rglob("segment-*")]
    return float(np.concatenate(segments)["seconds"].sum()), wall, len(list((folder / "sr").glob("lease-*")))
