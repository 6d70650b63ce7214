"""Ten thousand workers: what is done for every answer does not grow with them. Counted are passes and requests."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from distributed import LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from sleepy import job_of

sys.path.append(str(REPOSITORY / "benchmarks"))
from client_at_size import Clock, Scheduler

from pipeline.base.errors import ClusterError
from pipeline.cluster.patient_client import PatientClient
from pipeline.plan.receipt import QUARANTINED, WRITTEN, Receipt
from pipeline.process import descriptors
from pipeline.run import callback
from pipeline.schedule.crew import Crew
from pipeline.schedule.exam import Exam
from pipeline.schedule.execute import hand_out
from pipeline.schedule.in_flight import InFlight
from pipeline.schedule.progress import RunProgress
from pipeline.schedule.run_state import RunState
from pipeline.schedule.seldom import MAX_WAIT_S, Seldom
from pipeline.schedule.totals import RunTotals
from pipeline.schedule.usable import Usable
from pipeline.storage import ledger as ledgers
from pipeline.storage.kv import Store
from pipeline.storage.ledger import MAX_REASONS, Ledger
from pipeline.storage.same_place import LOOK_S
from pipeline.storage.target_lock import MAX_TOLD, TargetLock, last_workers, left_out
from pipeline.worker.job import Fitness, Job, LeaseResult, Question, Runtime

WORKER = {"status": "running", "last_seen": 0.0, "metrics": {}, "memory_limit": 0}


class Counted(dict[Any, Any]):
    """A dictionary that counts how often somebody goes through it."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        Counted.passes += 1
        return super().__iter__()

    def items(self) -> Any:
        Counted.passes += 1
        return super().items()

    def values(self) -> Any:
        Counted.passes += 1
        return super().values()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def write_all(job: Job, start: int, stop: int, max_s: float) -> LeaseResult:
    return LeaseResult(tuple(Receipt(i, WRITTEN, seconds=30.0, worker=f"h:{i % 7}") for i in range(start, stop)), 0, 0)


class Enough(Exception):
    pass


class Slow(Scheduler):
    """Takes two seconds to say who is there, as one does whose machine is loaded."""

    def __init__(self, count: int, clock: Clock) -> None:
        super().__init__(count, WORKER)
        self._clock, self.asked = clock, 0

    def nthreads(self) -> Any:
        self._clock.now += 2
        self.asked += 1
        return super().nthreads()

    def say(self, **message: Any) -> None:
        self._topics["all"]((0.0, message))


def test_workers_that_were_asked_to_end_are_gone_at_once(tmp_path: Path, clock: Clock) -> None:
    """A batch system scales down, or somebody retires the workers: no look at all of them has to find it out.

    Nobody's tasks are blamed on it. What other users say under that name is no worker's end.
    """
    slow = Slow(2, clock)
    scheduler: Any = slow
    in_flight = InFlight(scheduler, job_of(str(tmp_path), 10, 1), write_all, crew := Crew(scheduler))
    assert in_flight.capacity().workers == 2
    asked = slow.asked
    gone = list(crew.fit_addresses())
    slow.say(action="remove-worker", comment="mine")
    for address in gone:
        slow.say(action="remove-worker", worker=address, expected=True, **{"processing-tasks": ("k",)})
    assert in_flight.collect(0.0) == []
    assert (in_flight.capacity().workers, slow.asked) == (0, asked)
    assert not in_flight._deaths._open


def test_a_client_that_is_too_busy_to_leave_in_time_does_not_fail() -> None:
    """Twenty thousand leases are cancelled at the end of a run; what was written is written however long that takes."""
    free = threading.Event()
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster:
        client = PatientClient(cluster, set_as_default=False)
        client.loop.add_callback(free.wait)
        client.close(timeout=0.1)
        assert client.status == "closing"
        free.set()


def test_while_no_worker_can_be_used_slow_looks_are_not_put_off(clock: Clock) -> None:
    """With workers, looks that take two seconds are ten seconds apart. Without any the one that comes is waited for."""
    slow = Slow(0, clock)
    scheduler: Any = slow
    crew = Crew(scheduler)
    for _ in range(40):
        clock.now += 0.1
        crew.look()
    assert slow.asked >= 2
    slow._threads = Scheduler(3, WORKER)._threads
    slow._known = Scheduler(3, WORKER)._known
    while not crew.capacity().workers:
        clock.now += 0.1
        crew.look()
    slow.asked, began = 0, clock.now
    while clock.now - began < MAX_WAIT_S - 1:
        clock.now += 0.1
        crew.look()
    assert slow.asked <= 1


def test_an_answer_costs_no_pass_over_workers_or_leases(tmp_path: Path, clock: Clock) -> None:
    """While nobody comes or leaves and no second has gone by, a hundred answers go through neither of them once."""
    workers, answers = 200, 100
    scheduler: Any = Scheduler(workers, WORKER)
    job = job_of(str(tmp_path), 4000, 1)
    run = RunState(job, Ledger(Store(f"file://{tmp_path}"), job.digest, job.plan.tasks, "r"))
    lock = TargetLock(Store(f"file://{tmp_path}"), "r")
    crew = Crew(scheduler)
    in_flight = InFlight(scheduler, job, write_all, crew)
    left = [answers]
    with (tmp_path / "progress").open("w") as stream, RunProgress(job.plan.tasks, 0, stream) as progress:
        show = callback(progress, lock)

        def watch(totals: RunTotals) -> None:
            show(totals)
            if isinstance(crew._there, Counted):
                left[0] -= 1
                if not left[0]:
                    raise Enough
            elif len(in_flight._out) > 2 * workers:
                crew._there = Counted(crew._there)
                crew._usable._facts = Counted(crew._usable._facts)
                in_flight._out = Counted(in_flight._out)
                totals.workers = Counted(totals.workers)
                Counted.passes = 0
            else:
                clock.now += 1
            scheduler.answer_next()

        with pytest.raises(Enough):
            hand_out(run, in_flight, run.ledger, [range(job.plan.tasks)], watch)
    assert Counted.passes <= 2, "the end of the run cancels what is out"


def test_looks_at_all_workers_take_a_share_of_the_time() -> None:
    """One that took 0.2 s is repeated after 4 s, not after one; one that took a minute after ten seconds."""
    seldom = Seldom(1.0)
    assert seldom.due(0.0)
    seldom.took(10.0, 10.001)
    assert not seldom.due(10.9)
    assert seldom.due(11.0)
    seldom.took(20.0, 20.2)
    assert not seldom.due(24.1)
    assert seldom.due(24.3)
    seldom.took(30.0, 90.0)
    assert seldom.due(90.1 + MAX_WAIT_S)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 3), st.sampled_from(["", "a", "b", "c"]))))
def test_usable_workers_are_what_was_put_in_and_not_taken_out(steps: list[tuple[bool, int, int, str]]) -> None:
    usable, plain = Usable(), dict[str, tuple[int, str]]()
    for put, number, threads, name in steps:
        if put:
            usable.put(str(number), threads, name)
            plain[str(number)] = threads, name
        else:
            usable.discard(str(number))
            plain.pop(str(number), None)
        assert set(usable.addresses) == plain.keys()
        assert (len(usable), usable.threads) == (len(plain), sum(threads for threads, _ in plain.values()))
        assert usable.named({"a", "b"}) == sum(name in "ab" and name != "" for _, name in plain.values())
        others = {address for address, (_, name) in plain.items() if name not in ("a", "b")}
        found = usable.some(2, {"a", "b"})
        assert len(set(found)) == min(2, len(others or plain))
        assert set(found) <= (others or plain.keys())


def fit(job: Job, question: Question) -> Fitness:
    """Leaves nothing for the client."""
    return Fitness(Runtime("torch", "cpu"), 0)


def test_replies_that_are_not_there_are_waited_for_together(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred workers write to another disk. No one is slept for; all are found out in two rounds of ten seconds."""
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the client must not wait for one worker"))
    scheduler: Any = Scheduler(100, WORKER)
    exam = Exam(dataclasses.replace(job_of(str(tmp_path / "sr"), 1, 1), run="r"), fit)
    aside: list[str] = []
    crew = Crew(scheduler, exam, lambda who, why: aside.append(why))
    monkeypatch.setattr(crew.absence, "refuse", lambda possible, now: None)
    for _ in range(round(2.5 * LOOK_S / 0.5)):
        clock.now += 0.5
        crew.look()
    assert len(aside) == 100
    assert "is not there for the client" in aside[0]


def test_the_lock_tells_of_the_last_workers_and_how_many_there_are(tmp_path: Path) -> None:
    """It is written every ten seconds, so it must not grow with the crew."""
    store = Store(f"file://{tmp_path}")
    lock, totals = TargetLock(store, "r"), RunTotals()
    for index in range(3 * MAX_TOLD):
        totals.add_receipt(Receipt(index, WRITTEN, seconds=1.0, worker=f"h:{index}"))
    totals.add_receipt(Receipt(9, WRITTEN, seconds=1.0, worker="h:0"))
    with RunProgress(1, 0, (tmp_path / "progress").open("w")) as progress:
        callback(progress, lock)(totals)
    lock.acquire()
    lock.release()
    told = last_workers(store)
    assert list(told) == [f"h:{n}" for n in range(2 * MAX_TOLD + 1, 3 * MAX_TOLD)] + ["h:0"]
    assert told["h:0"]["tasks"] == 2
    assert left_out(store) == {"workers": 2 * MAX_TOLD, "set_aside": 0}


class Noted(Store):
    """Notes what is put together."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.puts: list[list[str]] = []

    def put_all(self, items: Mapping[str, bytes]) -> None:
        self.puts.append([key.partition("/")[2] for key in items])
        super().put_all(items)


def test_many_quarantined_tasks_are_put_together(tmp_path: Path, clock: Clock) -> None:
    """2,000 reasons are eight batches, each before its segment; no call of `tick` waits for more than one batch."""
    store = Noted(f"file://{tmp_path}")
    ledger = Ledger(store, "d" * 64, 3000, "r")
    ledger.record(Receipt(i, QUARANTINED, error=f"E: {i}") for i in range(2000))
    ledger.record(Receipt(i, WRITTEN, checksum=i) for i in range(2000, 3000))
    ticks = 0
    while len(store.puts) < 16:
        clock.now += 1
        before = len(store.puts)
        ledger.tick()
        ticks += 1
        assert len(store.puts) - before <= 2
        assert ticks < 30
    for reasons, (segment,) in zip(store.puts[::2], store.puts[1::2], strict=True):
        assert all(key.startswith("quarantine/") for key in reasons)
        assert len(reasons) <= MAX_REASONS
        assert segment.startswith("segment-")
    again = Ledger(Store(f"file://{tmp_path}"), "d" * 64, 3000, "s")
    again.load()
    assert again.counts() == {"pending": 0, "written": 1000, "skipped": 0, "quarantined": 2000}
    assert again.why(1999).error == "E: 1999"


KILLED = """
import os, signal, sys
from pipeline.plan.receipt import QUARANTINED, Receipt
from pipeline.storage.kv import Store
from pipeline.storage.ledger import MAX_REASONS, Ledger

class Ends(Store):
    def put(self, key, value):
        if "segment-0000000002" in key:
            os.kill(os.getpid(), signal.SIGKILL)
        super().put(key, value)

ledger = Ledger(Ends(sys.argv[1]), "d" * 64, 1000, "r")
ledger.record(Receipt(i, QUARANTINED, error=f"E: {i}") for i in range(3 * MAX_REASONS))
ledger.flush()
"""


def test_a_client_killed_between_reasons_and_their_segment_leaves_tasks_to_do(tmp_path: Path) -> None:
    """The reasons of the second batch are there; its tasks are pending, and what they become then is what counts."""
    url = f"file://{tmp_path}"
    done = subprocess.run([sys.executable, "-c", KILLED, url], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    again = Ledger(Store(url), "d" * 64, 1000, "s")
    again.load()
    assert list(again.indices(QUARANTINED, range(1000))) == list(range(MAX_REASONS))
    assert again.why(2 * MAX_REASONS - 1).error == f"E: {2 * MAX_REASONS - 1}"
    again.record([Receipt(MAX_REASONS, WRITTEN), Receipt(MAX_REASONS + 1, QUARANTINED, error="other")])
    again.flush()
    last = Ledger(Store(url), "d" * 64, 1000, "t")
    last.load()
    assert last.counts() == {
        "pending": 1000 - MAX_REASONS - 2,
        "written": 1,
        "skipped": 0,
        "quarantined": MAX_REASONS + 1,
    }
    assert last.why(MAX_REASONS + 1).error == "other"


def test_a_snapshot_tells_nothing_that_no_segment_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the queue is published, then the client is killed: the other half is pending, whatever is newest."""
    monkeypatch.setattr(ledgers, "SNAPSHOT_EVERY", 1)
    ledger = Ledger(Store(f"file://{tmp_path}"), "d" * 64, 1000, "r")
    ledger.record(Receipt(i, QUARANTINED, error="E") for i in range(MAX_REASONS))
    ledger.record(Receipt(i, QUARANTINED, error="E") for i in range(MAX_REASONS, 1000))
    ledger._tried = ledger._flushed = 0.0
    ledger.tick()
    again = Ledger(Store(f"file://{tmp_path}"), "d" * 64, 1000, "s")
    again.load()
    assert again.counts()["quarantined"] == MAX_REASONS


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 300))
from pipeline.process import descriptors
from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig
from pipeline.base.errors import ClusterError
from pipeline.cluster.patient_client import PatientClient
assert descriptors.raise_limit() == 300
try:
    with connect(ClusterConfig(workers=10_000), 1):
        pass
except ClusterError as error:
    print(error)
"""


def test_descriptors_are_raised_and_too_few_are_refused_before_a_worker_starts() -> None:
    found = subprocess.run([sys.executable, "-c", LIMITED], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "10,000 workers need about 110,256 open files" in found.stdout
    assert "ulimit -Hn" in found.stdout
    assert "at most 4 workers" in found.stdout


def test_enough_descriptors_are_not_refused() -> None:
    descriptors.refuse_too_few(1, 3, 1)
    with pytest.raises(ClusterError, match="open files"):
        descriptors.refuse_too_few(1 << 20, 3, 256)
