"""A worker that hangs at the end of a run is not waited for: its leases are started again elsewhere, and count once."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sleepy import job_of, sleep_and_put

from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig
from pipeline.plan.receipt import WRITTEN
from pipeline.schedule import leases
from pipeline.schedule.execute import execute
from pipeline.schedule.in_flight import InFlight
from pipeline.schedule.leases import Capacity
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals
from pipeline.storage.kv import Store
from pipeline.storage.ledger import RECORD, Ledger


def recorded(folder: Path) -> Counter[int]:
    """How often each task stands in the ledger's segments as written, read without the ledger's code."""
    found: Counter[int] = Counter()
    for segment in folder.rglob("segment-*"):
        records = np.frombuffer(segment.read_bytes(), RECORD, offset=12)
        found.update(records["index"][records["state"] == WRITTEN].tolist())
    return found


def put(folder: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in folder.glob("task-*")}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Store(f"file://{tmp_path / 'ledger'}"), "0" * 64, 40, "r")


def test_a_stopped_worker_does_not_hold_up_the_end(tmp_path: Path, ledger: Ledger) -> None:
    """The process is stopped half-way, with leases running and waiting; Dask would take it for dead in five minutes."""
    run = RunState(job_of(str(tmp_path / "sr"), 20, 2), ledger)
    with connect(ClusterConfig(workers=2), 2) as client:
        victim = next(iter(client.run(os.getpid).values()))
        stopped: list[int] = []

        def stop_half_way(totals: RunTotals) -> None:
            if totals.written >= 20 and not stopped:
                stopped.append(totals.written)
                os.kill(victim, signal.SIGSTOP)

        try:
            execute(client, run, sleep_and_put, stop_half_way)
        finally:
            os.kill(victim, signal.SIGCONT)
    assert stopped[0] < 40
    assert run.totals.started_again >= 1
    assert run.totals.written == 40
    assert recorded(tmp_path / "ledger") == Counter(range(40))
    assert put(tmp_path / "sr") == {f"task-{i}": str(i) for i in range(40)}


def test_the_first_answer_counts_and_the_other_is_dropped(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task hangs on the worker that tries it first, in the middle of the run; every worker answers all the time."""
    monkeypatch.setenv("HANGS", "17")
    (tmp_path / "sr").mkdir()
    run = RunState(job_of(str(tmp_path / "sr"), 20, 2), ledger)
    with connect(ClusterConfig(workers=2), 1) as client:
        execute(client, run, sleep_and_put)
        left = client.run_on_scheduler(
            lambda dask_scheduler: {prefix: len(found.groups) for prefix, found in dask_scheduler.task_prefixes.items()}
        )
    assert (tmp_path / "sr" / "tried-17").exists()
    assert run.totals.started_again >= 1, "what waits behind it on that worker is started again too"
    assert run.totals.written == 40
    assert recorded(tmp_path / "ledger") == Counter(range(40))
    assert set(left) <= {"lease"}, "nothing that lives for ever is named after a slab or lease"


def test_a_slow_slab_after_empty_ones_is_waited_for(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, 39 slabs outside the mask, one real one that takes a hundred times what would make it late."""
    monkeypatch.setenv("EMPTY", "39")
    monkeypatch.setenv("TASK_S", "10")
    monkeypatch.setattr(leases, "MIN_LATE_S", 0.1)
    run = RunState(job_of(str(tmp_path / "sr"), 40, 1), ledger)
    with connect(ClusterConfig(workers=2), 1) as client:
        execute(client, run, sleep_and_put)
    assert (run.totals.skipped, run.totals.written, run.totals.started_again) == (39, 1, 0)


def test_a_copy_that_no_other_worker_can_take_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler counts two workers, of which one has gone since: the copy is submitted all the same."""
    monkeypatch.setattr(InFlight, "capacity", lambda self: Capacity(2, 2))
    monkeypatch.setattr(leases, "MIN_LATE_S", 0.1)
    monkeypatch.setattr(leases, "LATE_FACTOR", 0.0)
    monkeypatch.setenv("TASK_S", "1.5")
    ledger = Ledger(Store(f"file://{tmp_path / 'ledger'}"), "0" * 64, 4, "r")
    run = RunState(job_of(str(tmp_path / "sr"), 4, 1), ledger)
    with connect(ClusterConfig(workers=1), 1) as client:
        execute(client, run, sleep_and_put)
    assert run.totals.started_again >= 1
    assert run.totals.written == 4


def test_a_copy_meant_for_a_worker_that_has_gone_runs_elsewhere(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The idlest worker goes between the question who is idle and the submission; the first copy hangs for ever."""
    monkeypatch.setattr(InFlight, "capacity", lambda self: Capacity(2, 2))
    monkeypatch.setattr(InFlight, "_workers_without", lambda self, lease: ["tcp://127.0.0.1:1"])
    monkeypatch.setattr(leases, "MIN_LATE_S", 0.1)
    monkeypatch.setattr(leases, "LATE_FACTOR", 0.0)
    monkeypatch.setenv("HANGS", "39")
    (tmp_path / "sr").mkdir()
    run = RunState(job_of(str(tmp_path / "sr"), 40, 1), ledger)
    with connect(ClusterConfig(workers=1), 2) as client:
        execute(client, run, sleep_and_put)
    assert (tmp_path / "sr" / "tried-39").exists()
    assert run.totals.written == 40
