"""Counts what one client takes of a core with ten thousand workers: CPU of its own code per answer, bytes of its lock.

    python benchmarks/client_at_size.py [workers=10000] [answers=3000] [out=2*workers]
    PYTHONPATH=CHECKOUT python benchmarks/client_at_size.py 10000 300 300    # of another commit, as of a12ac8e

Crew, exam, leases, ledger, lock, progress and receipts are the real ones, wired as `emsr run` wires them; so is what a
worker makes of a lease, but for the task. Dask's scheduler and its client are stood in for: questions are answered at
once, with what a real scheduler would send of so many workers, packed as it packs it. The clock is one that goes on by
a hundredth of a second with every answer, as ten thousand workers give a hundred a second, so that the result does not
depend on what else the machine does. Measured is the CPU time of the main thread once `out` leases are out: without it,
once every thread has one. What Dask takes itself: benchmarks/scheduler_at_size.py.

A commit before bd38923 has no function of its own for what is called after every answer; what it did is said below.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from distributed import Client, LocalCluster
from distributed.protocol import dumps, loads
from noop_slabs import planned
from parts.stand_in_answers import SLABS, THREADS, answer, fit

from pipeline import run as command
from pipeline.config import urls
from pipeline.schedule import exam as exam_module
from pipeline.schedule import results
from pipeline.schedule.crew import Crew
from pipeline.schedule.exam import Exam
from pipeline.schedule.execute import execute
from pipeline.schedule.leases import LEASES_PER_S
from pipeline.schedule.progress import RunProgress
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import KEY, TargetLock


class Clock:
    """Seconds that go on when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scheduler:
    """What emsr asks of Dask's client, answered for `count` workers that are all alike."""

    def __init__(self, count: int, worker: dict[str, Any]) -> None:
        addresses = [f"tcp://10.{n >> 16}.{n >> 8 & 255}.{n & 255}:9000" for n in range(count)]
        self._threads = dumps(dict.fromkeys(addresses, THREADS))
        self._known = dumps({"workers": {a: worker | {"nthreads": THREADS, "nanny": f"{a}1"} for a in addresses}})
        self._topics: dict[str, Callable[[tuple[float, Any]], None]] = {}
        self._addresses, self._turn = addresses, 0
        self.due: deque[tuple[Any, bytes, str]] = deque()
        self.scheduler, self.cluster = SimpleNamespace(ncores_running=self._threads), None
        self.own_s = 0.0
        """CPU seconds of what workers and scheduler do here."""

    def nthreads(self) -> Any:
        return loads(self._threads)

    def sync(self, answer: Any) -> Any:
        return loads(answer)

    def scheduler_info(self, n_workers: int) -> Any:
        return loads(self._known)

    def subscribe_topic(self, topic: str, receive: Callable[[tuple[float, Any]], None]) -> None:
        self._topics[topic] = receive

    def unsubscribe_topic(self, topic: str) -> None:
        self._topics.pop(topic, None)

    def cancel(self, futures: list[Any], force: bool) -> None:
        self.due.clear()

    def submit(self, run: object, packed: bytes, key: str, workers: list[str] | None = None, **rest: object) -> Any:
        self._turn = (self._turn + 1) % len(self._addresses)
        address = workers[0] if workers else self._addresses[self._turn]
        told: list[Callable[[Any], None]] = []
        future = SimpleNamespace(key=key, status="pending", add_done_callback=told.append, told=told)
        future.release = future.cancel = lambda: None
        future.done = lambda: future.status != "pending"
        if key.startswith("check-"):
            self._end(future, packed, address)
            future.add_done_callback = lambda call: call(future)
        else:
            self.due.append((future, packed, address))
        return future

    def answer_next(self) -> None:
        """The worker whose turn it is ends its lease."""
        began = time.thread_time()
        self._end(*self.due.popleft())
        self.own_s += time.thread_time() - began

    def _end(self, future: Any, packed: bytes, address: str) -> None:
        def tell(topic: str, message: Any) -> None:
            self._topics[topic]((0.0, loads(dumps(message))))

        worker = SimpleNamespace(address=address, get_current_task=lambda: future.key, log_event=tell)
        with mock.patch.object(results, "get_worker", return_value=worker):
            results.run_packed(packed)
        future.status = "finished"
        for call in future.told:
            call(future)


class _Enough(Exception):
    pass


def _callback_until_bd38923(progress: RunProgress, lock: TargetLock) -> Callable[[RunTotals], None]:
    """The lines of a12ac8e's pipeline/run.py, which were inside of what runs a whole target."""
    told = 0.0

    def show(totals: RunTotals) -> None:
        nonlocal told
        progress.update(totals)
        totals.dropped_lines = progress.dropped
        if time.monotonic() - told > command.TELL_S:
            told = time.monotonic()
            command._tell(lock, totals)

    return show


callback = getattr(command, "callback", _callback_until_bd38923)


def measure(workers: int, answers: int, out_at_first: int, worker: dict[str, Any], folder: str) -> dict[str, Any]:
    time.monotonic = clock = Clock()  # type: ignore[assignment]
    scheduler = Scheduler(workers, worker)
    client: Any = scheduler
    job = planned(SLABS)
    job = dataclasses.replace(job, target=dataclasses.replace(job.target, url=f"file://{folder}/sr"), run="bench")
    store = Store(urls.sidecar(job.target.url))
    lock, exam = TargetLock(store, "bench"), Exam(job, fit)
    exam_module._sample = lambda job: None  # type: ignore[assignment]  # its source exists nowhere
    crew = Crew(client, exam)
    exam.begin()
    began = time.thread_time()
    while crew.capacity().workers < workers:
        clock.now += 0.1
        crew.look()
        if crew.answered:
            crew.settle()
    out: dict[str, Any] = {
        "workers": workers,
        "leases_out": out_at_first or crew.capacity().threads,
        "exam_cpu_ms_per_worker": round(1e3 * (time.thread_time() - began) / workers, 2),
    }
    lock.acquire()
    ledger = Ledger(store, job.digest, job.plan.tasks, "bench", lock.hold)
    run = RunState(exam.job, ledger, lock)
    marks: list[tuple[float, float, int]] = []
    answered = 0
    began_run, wanted = clock.now, out_at_first or crew.capacity().threads
    with (Path(folder) / "progress").open("w") as stream, RunProgress(ledger.tasks, 0, stream) as progress:
        show = callback(progress, lock)

        def watch(totals: RunTotals) -> None:
            nonlocal answered
            show(totals)
            if not marks and len(scheduler.due) >= wanted:
                out["s_until_so_many_leases_are_out"] = round(clock.now - began_run)
                marks.append((time.thread_time() - scheduler.own_s, clock.now, answered))
            elif marks and answered - marks[0][2] >= answers:
                marks.append((time.thread_time() - scheduler.own_s, clock.now, answered))
                raise _Enough
            clock.now += 1 / LEASES_PER_S
            answered += 1
            scheduler.answer_next()

        with suppress(_Enough):
            execute(client, run, answer, watch, crew)
    (before, at, first), (after, then, last) = marks
    out["ms_per_answer"] = round(1e3 * (after - before) / (last - first), 3)
    out["share_of_a_core"] = round((after - before) / (then - at), 3)
    lock.release()
    value = store.get(KEY) or b""
    out |= {"lock_bytes": len(value), "workers_in_lock": len(json.loads(value)["workers"])}
    out["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    return out


def known_worker() -> dict[str, Any]:
    """What a real scheduler tells of a real worker."""
    with LocalCluster(1, processes=False, dashboard_address=None) as cluster, Client(cluster) as client:
        (worker,) = client.scheduler_info(-1)["workers"].values()
    return dict(worker)


if __name__ == "__main__":
    import client_at_size  # its functions are pickled by this name

    workers, answers, most = (int(a) for a in sys.argv[1:] + ["10000", "3000", "0"][len(sys.argv) - 1 :])
    worker = known_worker()
    for count in sorted({100, workers}):
        with tempfile.TemporaryDirectory() as folder:
            print(client_at_size.measure(count, answers, min(most, THREADS * count), worker, folder), flush=True)
