"""The workers of a run: which are there, and which of them are fit for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from distributed import Client

from pipeline.base.errors import ClusterError, EmsrError, TransientError
from pipeline.cluster.patient_client import call
from pipeline.schedule.absence import NO_WORKER_S, Absence
from pipeline.schedule.aside import Aside
from pipeline.schedule.checks import Check, Checks
from pipeline.schedule.exam import Exam
from pipeline.schedule.leases import Capacity
from pipeline.schedule.paused import Paused
from pipeline.schedule.results import Ended
from pipeline.schedule.seldom import Seldom
from pipeline.schedule.silent import Silent
from pipeline.schedule.usable import Usable
from pipeline.schedule.worker_waits import WorkerWaits
from pipeline.worker.job import Process, Runtime

LOOK_S, CHECK_S = 1.0, 0.1
"""How often the scheduler is asked who is there, and how often answers are looked at."""
AGAIN_S = 5.0
"""A worker whose check failed for the moment is asked again after so long, for NO_WORKER_S in all."""
CANDIDATES = 16
"""Where not every worker is fit, a lease names so many that are, at random; more would cost the scheduler too much."""


@dataclass
class _Worker:
    """One that is there. `nanny` names it across restarts of its process, `name` is HOST:PID once it has answered.

    `beside_leases` is whether Dask may have given it leases when it came, before it had answered.
    """

    address: str
    threads: int
    nanny: str
    seen: float
    beside_leases: bool
    fit: bool = False
    aside: bool = False
    name: str = ""
    check: Check | None = None
    again: float = 0.0

    @property
    def process(self) -> Process:
        """The process as far as it is known."""
        host, _, pid = self.name.rpartition(":")
        return Process(self.address, host, int(pid or 0))


class Crew:
    """`tell` is called with a worker and a reason whenever one is set aside.

    Without an `exam` every worker is fit. With one, `look` sends each worker that comes its questions, and only those
    that have answered well count.
    """

    def __init__(
        self, client: Client, exam: Exam | None = None, tell: Callable[[str, str], None] = lambda who, why: None
    ) -> None:
        self._client, self.exam = client, exam
        self.aside = Aside(tell)
        self._checks = Checks(client, exam) if exam is not None else None
        self._there: dict[str, _Worker] = {}
        self._usable = Usable()
        self._unasked: deque[_Worker] = deque()
        self._gone: dict[str, tuple[str, Process]] = {}
        self._vouched: set[tuple[str, str]] = set()
        self._waiting: dict[Process, Runtime] = {}
        self._settled = exam is None
        self._checked = float("-inf")
        self._looks, self._meetings = Seldom(LOOK_S), Seldom(0.0)
        self._paused, self._silent = Paused(client), Silent(client)
        self.absence = Absence(client, self._paused, self.aside)
        self._waits = WorkerWaits(client, exam.job.run) if exam is not None else None
        self.newly_aside: list[str] = []
        self.left = 0
        """How many workers have left so far."""
        self.may_freeze: set[str] = set()
        """Hosts of workers that have answered so."""

    def capacity(self) -> Capacity:
        """The fit workers that are there and not paused, and their threads."""
        return Capacity(len(self._usable), self._usable.threads)

    @property
    def present(self) -> int:
        """How many workers are there, fit or not."""
        return len(self._there)

    @property
    def unanswered(self) -> int:
        """How many of them have neither answered nor were set aside yet."""
        return sum(not (worker.name or worker.aside) for worker in self._there.values())

    @property
    def mixed(self) -> bool:
        """Whether its workers may make different bytes of one task."""
        return self.exam is not None and self.exam.kinds > 1

    def is_there(self, addresses: Iterable[str]) -> bool:
        """Whether any of these workers is still there."""
        return any(address in self._there for address in addresses)

    def vouches(self, process: Process) -> bool | None:
        """Whether this process's results count; None while nobody knows. A worker that has left is judged as it was."""
        if (process.address, process.name) in self._vouched:
            return True
        worker = self._there.get(process.address)
        if self.exam is None:
            if worker is not None:
                worker.name = process.name
                self._may_be_used(worker)
            return worker is None or not worker.aside
        if worker is None or worker.aside:
            return False
        if worker.fit:  # another process at the same address
            worker.fit, worker.name = False, ""
            self._may_be_used(worker)
            self._unasked.appendleft(worker)
        return None

    def some(self, avoid: Iterable[str] = ()) -> list[str] | None:
        """Addresses for a lease that must not go anywhere else; None where it may go to any worker.

        None of `avoid` (HOST:PID) is among them, as long as there is another one. While a worker starts again whose
        process has ended, no lease may go there before it has answered, so that it is known what kills it.
        """
        avoided = set(avoid) - {""}
        every = len(self._usable) == len(self._there) and self._usable.named(avoided) in (0, len(self._usable))
        if every and not self.aside.restarting:
            return None
        return self._usable.some(CANDIDATES, avoided)

    def fit_addresses(self) -> Collection[str]:
        """All that may get leases."""
        return self._usable.addresses

    def _may_be_used(self, worker: _Worker) -> None:
        """See whether it may get leases now, after something about it has changed."""
        there = self._there.get(worker.address) is worker
        if there and worker.fit and worker.address not in self._paused.addresses:
            self._usable.put(worker.address, worker.threads, worker.name)
        elif there or worker.address not in self._there:
            self._usable.discard(worker.address)

    def says(self) -> list[str]:
        """What there is to say of workers since this was last asked: which are paused, what they wait for."""
        waits = self._waits.take() if self._waits is not None else []
        return self.absence.says() + self._paused.says() + self._silent.says() + waits

    def look(self, at_large: Callable[[], bool] = lambda: False) -> None:
        """See who has come, left and answered. The scheduler is asked once a second, less often where that takes long.

        `at_large` says whether leases are out that Dask may give to any worker, one that has just come among them.
        Raises ClusterError where the scheduler is gone, and as `absence` where there is no worker to be used.
        """
        now = time.monotonic()
        if self._looks.due(now):
            self._ask_scheduler(now, at_large)
            # While none can be used there is nothing that a look holds up.
            self._looks.took(now, time.monotonic() if len(self._usable) else now)
        if now - self._checked >= CHECK_S:
            self._checked = now
            self._check(now)
            self.absence.refuse(self._possible(), now)

    def _possible(self) -> Collection[str]:
        """Those that are there and were not set aside; where some may get leases, these alone."""
        return self._usable.addresses or [worker.address for worker in self._there.values() if not worker.aside]

    def _ask_scheduler(self, now: float, at_large: Callable[[], bool]) -> None:
        threads: dict[str, int] = call(self._client.nthreads) or {}
        for address in self._there.keys() - threads.keys():
            self._left(address, now)
        if (new := threads.keys() - self._there.keys()) and self._meetings.due(now):
            self._meet({address: threads[address] for address in new}, now, at_large())
            self._meetings.took(now, time.monotonic())
        self._silent.look(now)
        self.look_for_paused()

    def _meet(self, threads: dict[str, int], now: float, beside_leases: bool) -> None:
        """Take up workers that have come, with their threads."""
        known = call(self._client.scheduler_info, -1)["workers"]
        for address in threads.keys() & known.keys():  # else it is gone by now, and nobody knows whose process it was
            nanny = known[address].get("nanny") or address
            worker = _Worker(address, threads[address], nanny, now, beside_leases)
            worker.aside = self.aside.holds(nanny)
            worker.fit = self.exam is None and not worker.aside
            self._there[address] = worker
            self._may_be_used(worker)
            self._unasked.appendleft(worker)
            if self.exam is None:
                self.aside.answered(nanny)

    def look_for_paused(self) -> None:
        """See whom Dask has paused: what they were given goes to others."""
        before = self._paused.addresses
        self.newly_aside.extend(call(self._paused.look))
        for address in before ^ self._paused.addresses:
            if address in self._there:
                self._may_be_used(self._there[address])

    def set_aside(self, process: Process, error: EmsrError) -> None:
        """This worker gets no further lease; `error` is why."""
        worker = self._there.get(process.address)
        if worker is not None and not worker.aside:
            self._leave_out(worker)
        self.aside.add(str(process), worker.nanny if worker else None, error)

    def set_aside_name(self, name: str, why: str) -> None:
        """The same for HOST:PID, with a reason in words."""
        for worker in self._there.values():
            if worker.name == name:
                self.set_aside(worker.process, ClusterError(why))
                return

    def nanny(self, address: str) -> str:
        """What this worker is known by across restarts, whether it is still there or not."""
        worker = self._there.get(address)
        return worker.nanny if worker is not None else self._gone.get(address, (address, None))[0]

    def departed(self, address: str) -> None:
        """The scheduler says that this worker's process has ended."""
        if address in self._there:
            self._left(address, time.monotonic())

    def set_aside_nanny(self, nanny: str, why: str) -> None:
        """The same for the worker that starts again whenever its process dies; the last one that is fit stays."""
        if all(self._there[address].nanny == nanny for address in self._usable.addresses):
            return
        for worker in self._there.values():
            if worker.nanny == nanny and not worker.aside:
                self._leave_out(worker)
        died = [process for other, process in self._gone.values() if other == nanny]
        died.sort(key=lambda process: process.pid != 0)  # one may have died before it said what it is
        error = ClusterError(why, "a worker with memory and time enough for the network", "See its log")
        self.aside.add(str(died[-1]) if died else f"the worker of {nanny}", nanny, error)

    def _leave_out(self, worker: _Worker) -> None:
        worker.fit, worker.aside = False, True
        self._may_be_used(worker)
        self.newly_aside.append(worker.address)

    def settle(self) -> None:
        """Those that have answered by now decide what the run computes with; those that come later follow."""
        assert self.exam is not None
        for process, why in self.exam.settle(self._waiting).items():
            self.set_aside(process, ClusterError(why, "", "Leave it out, or set cluster.mixed: true"))
        self._settled = True
        for process in self._waiting:
            self._welcome(process)
        self._waiting.clear()

    @property
    def answered(self) -> int:
        """How many workers have answered well and wait for `settle`."""
        return len(self._waiting)

    def close(self) -> None:
        """Ask nothing more."""
        if self._checks is not None:
            self._checks.close()
        if self._waits is not None:
            self._waits.close()

    def _left(self, address: str, now: float) -> None:
        worker = self._there.pop(address)
        self.left += 1
        self._usable.discard(address)
        if worker.nanny != address:
            self._gone.pop(address, None)  # the last one of its nanny stands last
            self._gone[address] = worker.nanny, worker.process
        if worker.fit:
            self.absence.lost(now)
        self._waiting = {who: found for who, found in self._waiting.items() if who.address != worker.address}
        self.aside.ended(worker.address, worker.nanny)
        if worker.check is not None and self._checks is not None:
            self._checks.forget(worker.check)
            self.aside.died(worker.address, worker.nanny, worker.beside_leases)

    def _check(self, now: float) -> None:
        if self._checks is None:
            return
        for check, ended in self._checks.take(now):
            found = self._there.get(check.address)
            if found is not None and found.check is check:
                self._judge(found, ended, self._checks.exam, now)
        while self._checks.free > 0 and self._unasked and now >= self._unasked[0].again:
            worker = self._unasked.popleft()
            here = self._there.get(worker.address) is worker
            if here and not (worker.fit or worker.aside or worker.name or worker.check):
                worker.check = self._checks.ask(worker.address)

    def _judge(self, worker: _Worker, ended: Ended | None, exam: Exam, now: float) -> None:
        worker.check = None
        if ended is None:
            self._unasked.appendleft(worker)
            return
        outcome = ended.outcome
        if isinstance(outcome, TransientError) and now - worker.seen < NO_WORKER_S:
            worker.again = now + AGAIN_S
            self._unasked.append(worker)
            return
        if isinstance(outcome, EmsrError):
            self.set_aside(ended.process, outcome)
            return
        if outcome.may_freeze:
            self.may_freeze.add(ended.process.host)
        if not self._settled:
            worker.name = ended.process.name
            self._waiting[ended.process] = outcome.runtime
        elif why := exam.refuse_late(outcome.runtime):
            self.set_aside(ended.process, ClusterError(why, "", "Leave it out, or set cluster.mixed: true"))
        else:
            self._welcome(ended.process)

    def _welcome(self, process: Process) -> None:
        worker = self._there.get(process.address)
        if worker is not None and not worker.aside:
            worker.fit, worker.name = True, process.name
            self._may_be_used(worker)
            self.aside.answered(worker.nanny)
            self._vouched.add((process.address, process.name))
