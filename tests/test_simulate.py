"""The simulator's model against a real run, and what it must do by arithmetic."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from distributed import Client
from sleepy import job_of, sleep_and_put

sys.path.append(str(REPOSITORY / "benchmarks"))
from simulate import Scenario, simulate

from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig
from pipeline.plan.plan import Plan
from pipeline.schedule.execute import execute
from pipeline.schedule.run_state import RunState
from pipeline.storage.kv import Store
from pipeline.storage.ledger import RECORD, Ledger

QUIET = Scenario(
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


pytestmark = pytest.mark.timeout(1200)  # a guard against hanging: real runs take minutes on a loaded machine


def changed(**values: object) -> Scenario:
    return Scenario(**{**QUIET.__dict__, **values})  # type: ignore[arg-type]


def plan_of(columns: int, depth: int) -> Plan:
    return job_of("/nowhere", columns, depth).plan


def test_an_undisturbed_run_takes_tasks_over_threads() -> None:
    """400 tasks of 10 s on 4 threads: 1000 s, and nothing lost."""
    result = simulate(plan_of(40, 10), QUIET)
    assert (result.written, result.deaths, result.lost_s, result.twice_s) == (400, 0, 0, 0)
    assert result.useful_s == pytest.approx(4000)
    assert 1000 <= result.wall_s < 1025
    assert (result.reads, result.writes) == (400 * QUIET.reads, 400 * QUIET.writes)


def test_the_dead_lose_their_leases_and_others_do_them() -> None:
    result = simulate(plan_of(40, 10), changed(death_s=500, back_s=50))
    assert result.written == 400
    assert result.deaths > 0
    assert 0 < result.lost_s <= result.deaths * 40, "at most the leases that ran"
    assert result.wall_s > 1000


def test_a_thread_that_hangs_is_not_waited_for() -> None:
    """One of two hundred tasks hangs, about: without second starts the run would not end."""
    result = simulate(plan_of(40, 10), changed(workers=16, hang_s=2000), seed=1)
    assert result.written == 400
    assert result.started_again >= 1


def test_a_store_that_refuses_slows_the_run_and_a_budget_avoids_the_refusals() -> None:
    """4 workers write 4 * 10 objects in 10 s; the store takes half of that for an hour."""
    busy = {"writes": 10, "store_per_s": 2, "doubling_s": 1e9}
    refused = simulate(plan_of(40, 10), changed(**busy))
    paced = simulate(plan_of(40, 10), changed(**busy, budget_writes=2))
    assert refused.refused > 0
    assert paced.refused == 0
    for result in (refused, paced):
        assert 1.7 * 1000 < result.wall_s < 2.3 * 1000


def test_all_threads_of_many_workers_are_busy_soon() -> None:
    """4,000 threads: their 6,000 slots are open after two minutes, half of the threads are busy within one."""
    result = simulate(plan_of(2000, 10), changed(workers=2000, threads=2, task_s=60))
    assert 20 < result.half_busy_s < 60


def test_the_ramp_ends_where_the_store_refuses() -> None:
    """1,000 workers would write 300 objects a second, and the store takes 100 for hours: the leases that are out fall
    until it refuses about one for each task, and no worker that is left idle costs time, for the store is the limit.
    """
    busy = {"workers": 1000, "threads": 1, "task_s": 20, "writes": 6, "store_per_s": 100, "doubling_s": 1e9}
    plan = plan_of(2000, 10)
    result = simulate(plan, changed(**busy))
    least_s = plan.tasks * 6 / 100
    assert result.refused < 2 * plan.tasks
    assert least_s < result.wall_s < 1.35 * least_s


def test_the_model_predicts_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, scheduler and ledger are real. What a task takes, and how long a thread waits for its next lease, are
    measured in the same run, so both grow on a loaded machine. From them the model says how long the run takes, within
    a factor of 1.5.
    """
    monkeypatch.setenv("TASK_S", "0.25")
    with connect(ClusterConfig(workers=2), 2) as client:
        real = real_run(client, tmp_path, 24)
    result = simulate(
        plan_of(24, 10),
        changed(workers=2, threads=2, task_s=real.task_s, lease_s=real.lease_s, open_s=real.open_s),
    )
    assert result.wall_s / 1.5 < real.wall_s < 1.5 * result.wall_s


@dataclass(frozen=True)
class Real:
    """Seconds of a run: means of a task, of a thread's wait for its next lease and for its first one; and the whole."""

    task_s: float
    lease_s: float
    open_s: float
    wall_s: float


def real_run(client: Client, folder: Path, columns: int) -> Real:
    """10 tasks a column on 4 threads. A lease puts an object when it begins, a task when it ends."""
    job = job_of(str(folder / "sr"), columns, 10)
    ledger = Ledger(Store(f"file://{folder / 'ledger'}"), job.digest, job.plan.tasks, "r")
    began = time.time()
    run = RunState(job, ledger)
    execute(client, run, sleep_and_put)
    assert run.totals.written == job.plan.tasks
    segments = [np.frombuffer(f.read_bytes(), RECORD, offset=12) for f in (folder / "ledger").rglob("segment-*")]
    put = {f.name: f.stat().st_mtime - began for f in (folder / "sr").iterdir()}
    first = sorted(int(name.removeprefix("lease-")) for name in put if name.startswith("lease-"))
    last = [index - 1 for index in [*first[1:], job.plan.tasks]]
    starts, ends = np.sort([put[f"lease-{i}"] for i in first]), np.sort([put[f"task-{i}"] for i in last])
    waits = starts[4:] - ends[:-4]  # the n-th lease begins in the thread that the (n - 4)-th end has freed
    return Real(
        float(np.concatenate(segments)["seconds"].mean()),
        max(0.0, float(waits.mean())),
        float(starts[:4].mean()),
        float(ends[-1]),
    )
