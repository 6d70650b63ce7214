"""Simulates a run on ten thousand workers: the scheduler's own code with an event queue in place of Dask.

    python benchmarks/simulate.py [gpu|cpu|spot|refused|budget|steep] [small]

The job is FAFB at x8 (benchmarks/parts/fafb.py). Workers come over time, die, reach their walltime, are slow or hang.
The store refuses writes whose rate grows too fast. `pipeline.schedule.leases` and `ramp` decide as in a real run, and
the ledger is the real one. Simulated are Dask (a lease goes to whichever thread is free; that of a dead worker to
another, up to the allowed failures), workers and the store; the exam of workers and what the client computes are left
out (benchmarks/client_at_size.py). `small` is a twentieth of workers and store, and 40,000 slabs, none of them skipped.
Printed are days, requests and lost work. tests/test_simulate.py checks the model against a real run.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from parts import fafb

from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import TargetConfig
from pipeline.plan.lattice import Lattice
from pipeline.plan.plan import Plan
from pipeline.plan.price import input_voxels
from pipeline.plan.receipt import QUARANTINED, SKIPPED, WRITTEN, Receipt
from pipeline.schedule.leases import Capacity, Lease, Leases
from pipeline.schedule.ramp import Ramp
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger

ALLOWED_FAILURES = 3
HOUR = 3600.0


@dataclass(frozen=True)
class Scenario:
    """The assumptions of a simulation. Times are in seconds; a mean time of infinity means never."""

    workers: int = 10_000
    threads: int = 2
    arrival_s: float = 600.0
    """Workers come evenly over this time."""
    task_s: float = 10.0
    """Mean time of a slab in one thread, while the other threads of its worker are busy too."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a task's time."""
    skipped_s: float = 0.05
    block_s: float = 2.0
    """Mean time of a task of the second pass."""
    open_s: float = 20.0
    """Time that the first lease of a worker takes beyond its tasks."""
    lease_s: float = 0.05
    """Time that every further lease takes beyond its tasks, for receipts and the next lease to be sent."""
    lease_cost_s: float = 0.003
    """Time of scheduler and client per lease. They handle one lease after another."""
    slow_share: float = 0.005
    slow_factor: float = 6.0
    hang_s: float = 1000 * HOUR
    """Mean working time until a thread hangs for ever."""
    death_s: float = 200 * HOUR
    """Mean time to a worker's crash or preemption. Another worker replaces it after `back_s`."""
    walltime_s: float = math.inf
    back_s: float = 300.0
    reads: float = 5.0
    """Read requests of a slab."""
    writes: float = 7.0
    store_per_s: float = 1000.0
    """Writes a second that the store accepts at first. It accepts twice as many after every `doubling_s`."""
    doubling_s: float = 1200.0
    budget_writes: float = math.inf


@dataclass
class Result:
    """The counts of a simulation. Seconds are summed over threads, but for wall_s and scheduler_s."""

    wall_s: float = 0.0
    useful_s: float = 0.0
    lost_s: float = 0.0
    """Time spent on leases whose worker died."""
    twice_s: float = 0.0
    """Time spent on leases that another copy had closed."""
    scheduler_s: float = 0.0
    leases: int = 0
    started_again: int = 0
    deaths: int = 0
    written: int = 0
    skipped: int = 0
    quarantined: int = 0
    reads: float = 0.0
    writes: float = 0.0
    refused: float = 0.0
    half_busy_s: float = math.inf
    """When half of all threads first were busy."""


@dataclass(eq=False)
class _Worker:
    """A worker and those that replace it; `life` numbers them."""

    speed: float
    life: int = 0
    alive: bool = False
    opened: bool = False
    running: set[_Copy] = field(default_factory=set)


@dataclass(eq=False)
class _Copy:
    """One copy of a lease: a task of Dask."""

    lease: Lease
    failures: int = 0
    worker: _Worker | None = None
    began: float = 0.0
    receipts: list[Receipt] = field(default_factory=list)
    refused: float = 0.0


class Simulation:
    def __init__(
        self, plan: Plan, ledger: Ledger, scenario: Scenario, skip: Callable[[int], bool], seed: int = 0
    ) -> None:
        self._plan, self._ledger, self._scenario, self._skip = plan, ledger, scenario, skip
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._idle: deque[tuple[_Worker, int]] = deque()
        self._waiting: deque[_Copy] = deque()
        self._alive = self._busy = 0
        self._scheduler_free = 0.0
        self._leases: Leases
        self._ramp = Ramp(0.0)
        self.result = Result()

    def run(self) -> Result:
        """Runs until every stage is closed, in one thread and without a clock."""
        scenario = self._scenario
        for n in range(scenario.workers):
            slow = self._random.random() < scenario.slow_share
            worker = _Worker(scenario.slow_factor if slow else 1.0)
            self._at(scenario.arrival_s * n / scenario.workers, lambda worker=worker: self._come(worker))  # type: ignore[misc]
        for stage in self._plan.passes():
            self._leases = Leases(self._plan, self._ledger, stage, 0.0, self._ramp)
            self._hand_out()
            while self._leases.out:
                due = self._events[0][0] if self._events else math.inf
                if due > self._now + 0.5:  # the schedule runs at least twice a second
                    self._now += 0.5
                else:
                    self._now, _, event = heapq.heappop(self._events)
                    event()
                self._hand_out()
            self._waiting.clear()
        self.result.wall_s = self._now
        return self.result

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _hand_out(self) -> None:
        capacity = Capacity(self._alive, self._alive * self._scenario.threads)
        while (lease := self._leases.next(self._now, capacity)) is not None:
            self._scheduler_free = max(self._now, self._scheduler_free) + self._scenario.lease_cost_s
            self.result.scheduler_s += self._scenario.lease_cost_s
            self.result.leases += 1
            self.result.started_again += lease.starts > 1
            copy = _Copy(lease)
            self._at(self._scheduler_free, lambda copy=copy: self._place(copy))  # type: ignore[misc]

    def _place(self, copy: _Copy) -> None:
        self._waiting.append(copy)
        self._assign()

    def _assign(self) -> None:
        """Gives waiting copies to idle threads, but never two copies of a lease to one worker."""
        for _ in range(len(self._waiting)):
            if not self._waiting or not self._idle:
                return
            worker, life = self._idle.popleft()
            if not worker.alive or worker.life != life:
                continue
            copy = self._waiting.popleft()
            if copy.lease.closed:
                self._idle.appendleft((worker, life))
            elif any(other.lease is copy.lease for other in worker.running):
                self._idle.append((worker, life))
                self._waiting.append(copy)
            else:
                self._begin(copy, worker)

    def _begin(self, copy: _Copy, worker: _Worker) -> None:
        """Computes what the worker does with the lease: tasks until `max_s` is over, as in process_lease."""
        scenario = self._scenario
        copy.worker, copy.began, copy.receipts = worker, self._now, []
        worker.running.add(copy)
        self._busy += 1
        if 2 * self._busy >= scenario.workers * scenario.threads:
            self.result.half_busy_s = min(self.result.half_busy_s, self._now)
        slowdown, refused = self._store()
        seconds = 0.0
        for index in copy.lease.span:
            if copy.receipts and seconds >= copy.lease.max_s:
                break
            skipped = index < self._plan.slabs and self._skip(index)
            mean = scenario.skipped_s if skipped else scenario.task_s if index < self._plan.slabs else scenario.block_s
            took = (
                mean * worker.speed * self._random.lognormvariate(0, scenario.spread) * (1.0 if skipped else slowdown)
            )
            copy.receipts.append(Receipt(index, SKIPPED if skipped else WRITTEN, seconds=took))
            seconds += took
        written = sum(r.state == WRITTEN for r in copy.receipts)
        self.result.reads += written * scenario.reads
        self.result.writes += written * scenario.writes
        copy.refused = written * refused
        self.result.refused += copy.refused
        seconds += scenario.lease_s if worker.opened else scenario.open_s
        worker.opened = True
        if self._random.random() < seconds / scenario.hang_s:
            return  # the lease ends only when its worker dies
        self._at(self._now + seconds, lambda life=worker.life: self._end(copy, worker, life))  # type: ignore[misc]

    def _store(self) -> tuple[float, float]:
        """The factor by which the store slows a task down now, and how many writes of a slab it refuses, which are sent
        again.
        """
        scenario = self._scenario
        wanted = self._busy * scenario.writes / scenario.task_s
        paced = min(wanted, scenario.budget_writes)
        taken = scenario.store_per_s * 2 ** min(50.0, self._now / scenario.doubling_s)
        refused = (paced / taken - 1) * scenario.writes if paced > taken else 0.0
        return (max(1.0, wanted / min(paced, taken)) if wanted else 1.0), refused

    def _end(self, copy: _Copy, worker: _Worker, life: int) -> None:
        if not worker.alive or worker.life != life:
            return
        worker.running.discard(copy)
        self._busy -= 1
        self._idle.append((worker, life))
        spent = self._now - copy.began
        self._leases.seen(copy.lease, self._now, len(copy.receipts), round(copy.refused))
        if copy.lease.closed:
            self.result.twice_s += spent
        else:
            self._count(self._leases.ended(copy.lease, copy.receipts))
            self.result.useful_s += spent
        self._assign()

    def _count(self, receipts: object) -> None:
        for receipt in receipts:  # type: ignore[attr-defined]
            self.result.written += receipt.state == WRITTEN
            self.result.skipped += receipt.state == SKIPPED
            self.result.quarantined += receipt.state == QUARANTINED
        self._ledger.record(receipts)  # type: ignore[arg-type]
        self._ledger.tick()

    def _come(self, worker: _Worker) -> None:
        scenario = self._scenario
        worker.life += 1
        worker.alive, worker.opened = True, False
        self._alive += 1
        self._idle.extend([(worker, worker.life)] * scenario.threads)
        ends = min(
            scenario.walltime_s,
            self._random.expovariate(1 / scenario.death_s) if scenario.death_s < math.inf else math.inf,
        )
        if ends < math.inf:
            self._at(self._now + ends, lambda life=worker.life: self._die(worker, life))  # type: ignore[misc]
        self._assign()

    def _die(self, worker: _Worker, life: int) -> None:
        if not worker.alive or worker.life != life:
            return
        worker.alive = False
        self._alive -= 1
        self.result.deaths += 1
        for copy in worker.running:
            self._busy -= 1
            self.result.lost_s += self._now - copy.began
            copy.failures += 1
            if copy.lease.closed:
                continue
            if copy.failures > ALLOWED_FAILURES:
                self._count(self._leases.died(copy.lease))
            else:
                self._waiting.appendleft(copy)
        worker.running.clear()
        self._at(self._now + self._scenario.back_s, lambda: self._come(worker))
        self._assign()


def simulate(
    plan: Plan, scenario: Scenario, skip: Callable[[int], bool] = lambda index: False, seed: int = 0
) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        result = Simulation(
            plan, Ledger(Store(f"file://{folder}"), "0" * 64, plan.tasks, "simulated"), scenario, skip, seed
        ).run()
    assert result.written + result.skipped + result.quarantined == plan.tasks
    return result


def fafb_scenario(plan: Plan, slab_s: float) -> Scenario:
    """Workers of one device that computes a slab in `slab_s`, shared by two threads."""
    read = input_voxels(plan, fafb.SOURCE_CHUNK).decoded / fafb.SOURCE_CHUNK.product / plan.slabs
    return Scenario(task_s=2 * slab_s, reads=read, writes=fafb.puts_per_slab(plan))


def scenarios(plan: Plan) -> dict[str, Scenario]:
    gpu = fafb_scenario(plan, fafb.h100_slab_seconds(plan, "tf32"))
    core_s = fafb.slab_flop(plan) / (fafb.CPU_CORE_TFLOPS * 1e12)
    cpu = replace(fafb_scenario(plan, core_s), walltime_s=24 * HOUR, death_s=1000 * HOUR)
    spot = replace(gpu, death_s=4 * HOUR, back_s=900)
    many = replace(gpu, writes=256.0)  # unsharded: an object per chunk
    steep = replace(
        gpu, arrival_s=0.0, writes=40.0
    )  # all workers are there at once, and write more than the store takes
    return {
        "steep": steep,
        "gpu": gpu,
        "cpu": cpu,
        "spot": spot,
        "refused": many,
        "budget": replace(many, budget_writes=1000.0),
    }


def show(scenario: Scenario, result: Result) -> None:
    worked = result.useful_s + result.lost_s + result.twice_s
    deaths, walltime = (f"{seconds / HOUR:.0f} h" for seconds in (scenario.death_s, scenario.walltime_s))
    lines = {
        "scenario": f"{scenario.workers:,} workers, {scenario.task_s:.0f} s a slab and thread, "
        f"a worker dies every {deaths}, walltime {walltime}",
        "days": f"{result.wall_s / 86400:.2f}",
        "tasks": f"{result.written:,} written, {result.skipped:,} skipped, {result.quarantined:,} quarantined",
        "half busy": f"after {result.half_busy_s:.0f} s",
        "requests": f"{result.reads:,.0f} reads, {result.writes:,.0f} writes, {result.refused:,.0f} refused (429, 503)",
        "lost work": f"{result.lost_s / worked:.2%} to {result.deaths:,} deaths",
        "done twice": f"{result.twice_s / worked:.2%}, {result.started_again:,} leases started again",
        "busy": f"{worked / (scenario.workers * scenario.threads * result.wall_s):.1%} of all threads",
        "scheduler": f"{result.scheduler_s / result.wall_s:.1%} busy with {result.leases:,} leases",
    }
    for name, line in lines.items():
        print(f"  {name:<11}{line}", flush=True)


def small(scenario: Scenario) -> tuple[Plan, Scenario]:
    """A twentieth of it, on 4,000 columns of ten slabs."""
    box = Box.of((0, 0, 0), (10, 8, 32_000))
    few = replace(scenario, workers=scenario.workers // 20, store_per_s=scenario.store_per_s / 20)
    return Plan(box, box, ZYX(1, 8, 8), 8, Lattice(8, 0, 1, "edge"), (), None), few


def main(names: list[str]) -> None:
    plan = fafb.plan_of(8, TargetConfig(url="x"))
    if "small" in names:
        for name, scenario in scenarios(plan).items():
            if name in names:
                columns, few = small(scenario)
                print(name, "small")
                show(few, simulate(columns, few))
        return
    columns = [fafb.is_tissue(plan, column * plan.grid.z) for column in range(plan.slabs // plan.grid.z)]
    for name, scenario in scenarios(plan).items():
        if name in names or not names:
            print(name)
            show(scenario, simulate(plan, scenario, lambda index: not columns[index // plan.grid.z]))


if __name__ == "__main__":
    main(sys.argv[1:])
