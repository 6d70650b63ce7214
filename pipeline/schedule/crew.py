"""The workers of a run: which are fit for it, and which are set aside, by name and reason."""

from __future__ import annotations

import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from distributed import Client, Future

from pipeline.base.errors import ClusterError, EmsrError, TransientError, UserError
from pipeline.cluster.connect import may_come, why_none
from pipeline.schedule.exam import Exam
from pipeline.schedule.leases import Capacity
from pipeline.schedule.paused import Paused
from pipeline.schedule.results import CHECKS, Ended, Results, run_packed
from pipeline.schedule.worker_waits import WorkerWaits
from pipeline.worker.job import Fitness, Process, Runtime

T = TypeVar("T")

NO_WORKER_S = 300.0
"""A run ends after so many seconds without a worker, unless a batch system may still give one."""
LOOK_S, CHECK_S = 1.0, 0.1
"""How often the scheduler is asked who is there, and how often answers are looked at."""
SAY_S = 20.0
"""Why there is no worker is said after so many seconds, and after twice as many each time."""
MAX_CHECKS = 64
"""So many workers are checked at a time: object stores refuse what rises faster than they add servers."""
AGAIN_S = 5.0
"""A worker whose check failed for the moment is asked again after so long, for NO_WORKER_S in all."""
CANDIDATES = 16
"""Where not every worker is fit, a lease names so many that are, at random; more would cost the scheduler too much."""
MAX_RESTARTS = 3
"""A worker whose process died so often while it was checked is set aside."""
RETURN_S = 30.0
"""After a fit worker is gone, so long is it waited for, where only workers that were set aside are left."""


@dataclass
class _Worker:
    """One that is there. `nanny` names it across restarts of its process, `name` is HOST:PID once it has answered."""

    address: str
    threads: int
    nanny: str
    seen: float
    fit: bool = False
    aside: bool = False
    name: str = ""
    check: Future | None = None
    reply: str = ""
    again: float = 0.0


class Crew:
    """`tell` is called with a worker and a reason whenever one is set aside.

    Without an `exam` every worker is fit. With one, `look` sends each worker that comes its questions, and only those
    that have answered well count. `aside` holds who was set aside and why.
    """

    def __init__(
        self, client: Client, exam: Exam | None = None, tell: Callable[[str, str], None] = lambda who, why: None
    ) -> None:
        self._client, self.exam, self.tell = client, exam, tell
        self._prefix = f"check-{uuid.uuid4().hex[:8]}"
        self._answers = Results(client, self._prefix, CHECKS) if exam is not None else None
        self._there: dict[str, _Worker] = {}
        self._vouched: set[tuple[str, str]] = set()
        self._nannies: dict[str, str] = {}
        self._deaths: Counter[str] = Counter()
        self._waiting: dict[Process, Runtime] = {}
        self._settled = exam is None
        self._looked = self._checked = self._lost = float("-inf")
        self._had_one = time.monotonic()
        self._number = 0
        self._forgetting: list[Future] = []
        self._paused = Paused(client)
        self._waits = WorkerWaits(client, exam.job.run) if exam is not None else None
        self._say_s = SAY_S
        self._said: list[str] = []
        self.aside: dict[str, str] = {}
        self._errors: dict[str, EmsrError] = {}
        self.newly_aside: list[str] = []

    # What there is.

    def capacity(self) -> Capacity:
        """The fit workers that are there and not paused, and their threads."""
        fit = [worker.threads for worker in self._usable()]
        return Capacity(len(fit), sum(fit))

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
            return True
        if worker is None or worker.aside:
            return False
        if worker.fit:  # another process at the same address
            worker.fit, worker.name = False, ""
        return None

    def some(self, avoid: Iterable[str] = ()) -> list[str] | None:
        """Addresses for a lease that must not go anywhere else; None where it may go to any worker.

        None of `avoid` (HOST:PID) is among them, as long as there is another one.
        """
        fit = self._usable()
        avoided = set(avoid) - {""}
        chosen = [worker.address for worker in fit if worker.name not in avoided]
        if not chosen:
            chosen = [worker.address for worker in fit]
        if len(chosen) == len(self._there):
            return None
        return random.sample(chosen, min(len(chosen), CANDIDATES))

    def fit_addresses(self) -> set[str]:
        """All that may get leases."""
        return {worker.address for worker in self._usable()}

    def _usable(self) -> list[_Worker]:
        paused = self._paused.addresses
        return [worker for worker in self._there.values() if worker.fit and worker.address not in paused]

    def says(self) -> list[str]:
        """What there is to say of workers since this was last asked: which are paused, what they wait for."""
        said, self._said = self._said + self._paused.says(), []
        return said + (self._waits.take() if self._waits is not None else [])

    # What happens.

    def look(self) -> None:
        """See who has come, left and answered. The scheduler is asked once a second.

        Raises ClusterError where the scheduler is gone, or no worker was there for NO_WORKER_S and none may come; and
        where all are set aside, what each was set aside for. Paused workers count as absent.
        """
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._ask_scheduler(now)
        if now - self._checked >= CHECK_S:
            self._checked = now
            self._check(now)
            self._refuse_none(now)

    def _ask_scheduler(self, now: float) -> None:
        threads: dict[str, int] = call(self._client.nthreads) or {}
        for address in self._there.keys() - threads.keys():
            self._left(self._there.pop(address), now)
        if new := threads.keys() - self._there.keys():
            nannies = self._nannies_of() if self.exam is not None else {}
            for address in new:
                self._came(_Worker(address, threads[address], nannies.get(address) or address, now))
        self.look_for_paused()

    def look_for_paused(self) -> None:
        """See whom Dask has paused: what they were given goes to others."""
        self.newly_aside.extend(call(self._paused.look))

    def set_aside(self, process: Process, error: EmsrError) -> None:
        """This worker gets no further lease; `error` is why."""
        worker = self._there.get(process.address)
        if worker is not None and not worker.aside:
            worker.fit, worker.aside = False, True
            self._nannies[worker.nanny] = process.address
            self.newly_aside.append(worker.address)
        if str(process) not in self.aside:
            self.aside[str(process)] = str(error)
            self._errors[str(process)] = error
            self.tell(str(process), str(error))

    def set_aside_name(self, name: str, why: str) -> None:
        """The same for HOST:PID, with a reason in words."""
        for worker in self._there.values():
            if worker.name == name:
                host, _, pid = name.rpartition(":")
                self.set_aside(Process(worker.address, host, int(pid)), ClusterError(why))
                return

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
        for worker in self._there.values():
            if worker.check is not None:
                worker.check.cancel()
        if self._answers is not None:
            self._answers.close()
        if self._waits is not None:
            self._waits.close()

    def none_came(self) -> ClusterError:
        """The error of a run that has had no worker, or only paused ones, for NO_WORKER_S."""
        return self._paused.error(NO_WORKER_S) if self._paused.addresses else no_worker()

    def none_answered(self, seconds: float) -> ClusterError:
        """The error of a run whose workers have said nothing for so long."""
        if self._paused.addresses:
            return self._paused.error(seconds)
        return ClusterError(
            f"no worker answered in {seconds:.0f} s",
            "at least one Dask worker",
            "Start workers, then run the same command again",
        )

    def none_left(self) -> EmsrError:
        """The error of a run whose workers are all set aside: their common fault, or what each was set aside for."""
        (who, error), *others = self._errors.items()
        if len({_kind(e) for e in self._errors.values()}) == 1:
            who += f" (and {len(others)} more, likewise)" if others else ""
            if isinstance(error, UserError):
                return type(error)(f"{who}: {error.saw}", error.wanted, error.do)
            return ClusterError(f"{who}: {error}")
        said = [f"{who}: {why}" for who, why in list(self.aside.items())[:8]]
        more = f"\n  and {len(self.aside) - 8} more" if len(self.aside) > 8 else ""
        return ClusterError(
            "no worker is left that can do this run:\n  " + "\n  ".join(said) + more + "\n",
            "one that is fit",
            "Mend one of them, then run the same command again",
        )

    def _came(self, worker: _Worker) -> None:
        self._there[worker.address] = worker
        worker.fit = self.exam is None
        if (before := self._nannies.get(worker.nanny)) is not None:
            worker.aside = True  # the same one, in a new process
            self._nannies[worker.nanny] = before

    def _left(self, worker: _Worker, now: float) -> None:
        if worker.fit:
            self._lost = now
        self._waiting = {
            process: found for process, found in self._waiting.items() if process.address != worker.address
        }
        if worker.check is None:
            return
        worker.check.cancel()
        self._deaths[worker.nanny] += 1
        if self._deaths[worker.nanny] >= MAX_RESTARTS or worker.nanny == worker.address:
            self._nannies[worker.nanny] = worker.address
            error = ClusterError(
                f"its process ended {self._deaths[worker.nanny]} times while it opened the job",
                "a worker with memory for the network",
                "See its log",
            )
            who = f"worker {worker.address}"
            self.aside[who], self._errors[who] = str(error), error
            self.tell(who, str(error))

    def _check(self, now: float) -> None:
        if self.exam is None or self._answers is None:
            return
        for worker in self._there.values():
            if worker.check is not None and worker.check.done():
                self._judge(worker, self._answers.take(worker.check.key), now)
        free = MAX_CHECKS - sum(worker.check is not None for worker in self._there.values())
        for worker in self._there.values():
            if free > 0 and not (worker.fit or worker.aside or worker.name or worker.check) and now >= worker.again:
                packed, worker.reply = self.exam.packed()
                worker.check = self._ask(worker, packed)
                free -= 1

    def _ask(self, worker: _Worker, packed: bytes) -> Future:
        self._number += 1
        return self._client.submit(
            run_packed,
            packed,
            key=f"{self._prefix}-{self._number:x}",
            pure=False,
            workers=[worker.address],
            priority=1,  # before the leases that wait there
        )

    def _judge(self, worker: _Worker, ended: Ended | None, now: float) -> None:
        assert self.exam is not None
        assert worker.check is not None
        future, worker.check = worker.check, None
        if ended is None:
            if future.status == "error":  # it could not even read what it was asked
                error = ClusterError(f"it cannot do what this emsr asks: {future.exception()!r}", "the same emsr there")
                self.set_aside(Process(worker.address, "its host", 0), error)
            return
        outcome = ended.outcome
        try:
            if isinstance(outcome, Fitness):
                self.exam.refuse_unseen(worker.reply)
        except EmsrError as error:
            outcome = error
            self._forgetting.append(self._ask(worker, self.exam.packed_forget(worker.reply)))
        if isinstance(outcome, TransientError) and now - worker.seen < NO_WORKER_S:
            worker.again = now + AGAIN_S
        elif isinstance(outcome, EmsrError):
            self.set_aside(ended.process, outcome)
        elif not self._settled:
            worker.name = ended.process.name
            self._waiting[ended.process] = outcome.runtime
        elif why := self.exam.refuse_late(outcome.runtime):
            self.set_aside(ended.process, ClusterError(why, "", "Leave it out, or set cluster.mixed: true"))
        else:
            self._welcome(ended.process)

    def _welcome(self, process: Process) -> None:
        worker = self._there.get(process.address)
        if worker is not None and not worker.aside:
            worker.fit, worker.name = True, process.name
            self._deaths.pop(worker.nanny, None)
            self._vouched.add((process.address, process.name))

    def _nannies_of(self) -> dict[str, str | None]:
        found: dict[str, Any] = call(self._client.scheduler_info, -1)
        return {address: worker.get("nanny") for address, worker in found["workers"].items()}

    def _refuse_none(self, now: float) -> None:
        possible = [worker.address for worker in self._there.values() if not worker.aside]
        if any(address not in self._paused.addresses for address in possible):
            self._had_one, self._say_s = now, SAY_S
            return
        if not possible and self.aside and now - self._lost > RETURN_S and not may_come(self._client):
            raise self.none_left()
        alone_s = now - self._had_one
        if alone_s > self._say_s:
            self._say_s *= 2
            why = why_none(self._client)
            self._said.append(f"no worker for {alone_s:.0f} s{why and ': '}{why}")
        if alone_s > NO_WORKER_S:
            if not may_come(self._client):
                raise self._paused.error(alone_s) if possible else self.none_left() if self.aside else no_worker()
            self._had_one, self._say_s = now, SAY_S


def no_worker() -> ClusterError:
    """The error of a run that has had no worker for NO_WORKER_S."""
    return ClusterError(
        f"no worker for {NO_WORKER_S:.0f} s",
        "at least one Dask worker",
        "Start workers, or see the logs of those that ended; then run the same command again",
    )


def call(question: Callable[..., T], *arguments: object) -> T:
    """What the scheduler answers. Raises ClusterError where it is gone."""
    try:
        return question(*arguments)
    except OSError as error:
        raise scheduler_gone(error) from None


def scheduler_gone(why: OSError | None = None) -> ClusterError:
    saw = "the Dask scheduler is gone" + (f" ({why})" if why else "")
    return ClusterError(saw, "a running scheduler", "Run the same command again: finished slabs are not repeated")


def _kind(error: EmsrError) -> str:
    """The error without its numbers, which differ where the fault is one."""
    return type(error).__name__ + "".join(c for c in str(error) if not c.isdigit())
