"""A worker that hangs at the end of a run is not waited for: its leases are started again elsewhere, and count once."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sleepy import job_of, sleep_and_put

from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig
from pipeline.schedule.schedule import Outcome, drive
from pipeline.storage.kv import Store
from pipeline.storage.ledger import RECORD, WRITTEN, Ledger


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
    job = job_of(str(tmp_path / "sr"), 20, 2)
    with connect(ClusterConfig(workers=2), 2) as client:
        victim = next(iter(client.run(os.getpid).values()))
        stopped: list[int] = []

        def stop_half_way(outcome: Outcome) -> None:
            if outcome.written >= 20 and not stopped:
                stopped.append(outcome.written)
                os.kill(victim, signal.SIGSTOP)

        try:
            outcome = drive(client, job, ledger, threading.Event(), progress=stop_half_way, work=sleep_and_put)
        finally:
            os.kill(victim, signal.SIGCONT)
    assert stopped[0] < 40
    assert outcome.started_again >= 1
    assert outcome.written == 40
    assert recorded(tmp_path / "ledger") == Counter(range(40))
    assert put(tmp_path / "sr") == {f"task-{i}": str(i) for i in range(40)}


def test_the_first_answer_counts_and_the_other_is_dropped(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task hangs on the worker that tries it first, in the middle of the run; every worker answers all the time."""
    monkeypatch.setenv("HANGS", "17")
    (tmp_path / "sr").mkdir()
    job = job_of(str(tmp_path / "sr"), 20, 2)
    with connect(ClusterConfig(workers=2), 1) as client:
        outcome = drive(client, job, ledger, threading.Event(), work=sleep_and_put)
        left = client.run_on_scheduler(
            lambda dask_scheduler: {prefix: len(found.groups) for prefix, found in dask_scheduler.task_prefixes.items()}
        )
    assert (tmp_path / "sr" / "tried-17").exists()
    assert outcome.started_again >= 1, "what waits behind it on that worker is started again too"
    assert outcome.written == 40
    assert recorded(tmp_path / "ledger") == Counter(range(40))
    assert set(left) <= {"lease"}, "nothing that lives for ever is named after a slab or lease"
