"""Decisions of the scheduler without Dask: every task is closed once whatever happens, and who gets what, when."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.geometry import ZYX, Box
from pipeline.plan.lattice import Lattice
from pipeline.plan.plan import Plan
from pipeline.plan.receipt import QUARANTINED, SKIPPED, WRITTEN, Receipt
from pipeline.schedule.leases import (
    LEASE_S,
    MAX_LEASE_TASKS,
    MAX_STARTS,
    MIN_LATE_S,
    Capacity,
    Lease,
    Leases,
)
from pipeline.schedule.ramp import FIRST, FULL_S, MIN_PER_S, Ramp
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger


def plan_of(columns: int, depth: int) -> Plan:
    box = Box.of((0, 0, 0), (depth, 8, 8 * columns))
    return Plan(box, box, ZYX(1, 8, 8), 8, Lattice(8, 0, 1, "edge"), (), None)


@pytest.fixture
def ledger_of() -> Iterator[object]:
    with tempfile.TemporaryDirectory() as folder:
        yield lambda plan: Ledger(Store(f"file://{folder}"), "d" * 64, plan.slabs, "r")


def begun(ledger_of: object, columns: int, depth: int) -> Leases:
    plan = plan_of(columns, depth)
    return Leases(plan, ledger_of(plan), range(plan.slabs), began=0.0)  # type: ignore[operator]


def done(span: range, seconds: float, state: int = WRITTEN) -> list[Receipt]:
    return [Receipt(i, state, seconds=seconds) for i in span]


def take(leases: Leases, now: float, capacity: Capacity) -> Lease:
    lease = leases.next(now, capacity)
    assert lease is not None
    return lease


def measured(leases: Leases, seconds: float, capacity: Capacity) -> None:
    """One task is handed out and comes back: from now on there is a measurement."""
    first = take(leases, 0.0, capacity)
    assert len(first.span) == 1, "one task until there is a measurement"
    leases.ended(first, done(first.span, seconds))


@pytest.mark.parametrize(
    ("seconds", "threads", "tasks"),
    [(1.0, 2, int(LEASE_S)), (0.001, 2, MAX_LEASE_TASKS), (60.0, 2, 1), (10.0, 2000, 2), (10.0, 20_000, 20)],
)
def test_a_lease_is_five_seconds_of_measured_tasks_and_longer_with_many_workers(
    ledger_of: object, seconds: float, threads: int, tasks: int
) -> None:
    """2,000 threads: 20 s; 20,000: 200 s, so that 100 leases end in a second."""
    capacity = Capacity(threads, threads)
    leases = begun(ledger_of, 20_000, 128)
    measured(leases, seconds, capacity)
    assert len(take(leases, 0.0, capacity).span) == tasks


def test_a_lease_ends_with_its_column(ledger_of: object) -> None:
    capacity = Capacity(1, 1)
    leases = begun(ledger_of, 400, 3)
    measured(leases, 0.01, capacity)
    assert [take(leases, 0.0, capacity).span for _ in range(2)] == [range(1, 3), range(3, 6)]


def test_near_the_end_leases_shrink_but_not_below_half_a_second(ledger_of: object) -> None:
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 1, 41)
    measured(leases, 0.2, capacity)
    assert len(take(leases, 0.0, capacity).span) == 40 // (2 * capacity.slots)
    leases = begun(ledger_of, 1, 41)
    measured(leases, 0.05, capacity)
    assert len(take(leases, 0.0, capacity).span) == 10


def test_what_a_worker_gives_back_is_handed_out_next(ledger_of: object) -> None:
    capacity = Capacity(1, 1)
    leases = begun(ledger_of, 100, 40)
    measured(leases, 0.1, capacity)
    lease = take(leases, 0.0, capacity)
    assert lease.span == range(1, 40)
    assert len(leases.ended(lease, done(lease.span[:10], 1.0))) == 10
    assert take(leases, 0.0, capacity).span.start == 11


def test_a_run_begins_as_a_ramp(ledger_of: object) -> None:
    capacity = Capacity(1024, 2048)
    leases = begun(ledger_of, 10_000, 10)

    def handed_out(now: float) -> int:
        count = 0
        while leases.next(now, capacity) is not None:
            count += 1
        return count

    assert handed_out(0.0) == FIRST
    assert handed_out(10.0) == 10 * MIN_PER_S
    assert handed_out(1e4) == capacity.slots - FIRST - 10 * MIN_PER_S
    assert handed_out(2e4) == 0


def test_a_late_lease_is_started_again_only_when_nothing_else_is_left(ledger_of: object) -> None:
    capacity = Capacity(2, 4)
    leases = begun(ledger_of, 4, 1)
    stuck = take(leases, 0.0, capacity)
    others = [take(leases, 0.0, capacity) for _ in range(2)]
    for lease in others:
        leases.ended(lease, done(lease.span, 1.0))
    fresh = take(leases, 1000.0, capacity)
    assert fresh is not stuck, "a pending task comes first, however late the lease is"
    assert take(leases, 1000.0, capacity) is stuck
    assert leases.next(1000.0, capacity) is None
    leases.ended(fresh, done(fresh.span, 1.0))
    assert leases.ended(stuck, done(stuck.span, 1.0)), "the first answer counts"
    assert stuck.closed
    assert leases.out == 0
    assert leases.next(2000.0, capacity) is None


def test_how_late_is_late(ledger_of: object) -> None:
    """Three times what slow tasks would take: 1 task of 4 s, one that waited before it, one for good measure: 36 s."""
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 3, 1)
    stuck, other = take(leases, 0.0, capacity), take(leases, 0.0, capacity)
    leases.ended(other, done(other.span, 4.0))
    third = take(leases, 0.0, capacity)
    leases.ended(third, done(third.span, 4.0))
    assert leases.next(23.0, capacity) is None  # the first lease has nobody before it: 3 * (1 + 1) * 4 s
    assert leases.next(25.0, capacity) is stuck
    assert leases.next(26.0, capacity) is None
    capacity = Capacity(4, 4)
    assert leases.next(51.0, capacity) is stuck
    assert stuck.starts == MAX_STARTS
    assert leases.next(1000.0, capacity) is None
    assert MIN_LATE_S < 23


def test_alone_on_one_worker_nothing_is_started_again(ledger_of: object) -> None:
    leases = begun(ledger_of, 2, 1)
    measured(leases, 1.0, Capacity(1, 2))
    take(leases, 0.0, Capacity(1, 2))
    assert leases.next(1000.0, Capacity(1, 2)) is None
    assert leases.next(1000.0, Capacity(2, 4)) is not None


def test_a_quarantined_answer_waits_for_the_other_copy(ledger_of: object) -> None:
    capacity = Capacity(2, 4)
    leases = begun(ledger_of, 2, 1)
    measured(leases, 1.0, capacity)
    lease = take(leases, 0.0, capacity)
    assert take(leases, 1000.0, capacity) is lease
    assert leases.ended(lease, done(lease.span, 1.0, QUARANTINED)) == ()
    assert not lease.closed
    assert leases.ended(lease, done(lease.span, 1.0))[0].state == WRITTEN
    assert lease.closed


def test_only_a_task_that_dies_alone_is_given_up(ledger_of: object) -> None:
    capacity = Capacity(1, 4)
    leases = begun(ledger_of, 2, 4)
    measured(leases, 0.1, capacity)
    lease = take(leases, 0.0, capacity)
    assert lease.span == range(1, 4)
    assert leases.died(lease) == ()
    singles = [take(leases, 0.0, capacity) for _ in range(3)]
    assert [s.span for s in singles] == [range(i, i + 1) for i in (1, 2, 3)]
    beside = take(leases, 0.0, capacity)
    assert leases.died(singles[0]) == ()
    for other in (*singles[1:], beside):
        assert leases.next(0.0, capacity) is None
        leases.ended(other, done(other.span, 0.1))
    alone = take(leases, 0.0, capacity)
    assert (alone.span, alone.alone) == (range(1, 2), True)
    assert leases.next(0.0, capacity) is None
    (given_up,) = leases.died(alone)
    assert (given_up.index, given_up.state) == (1, QUARANTINED)
    assert "LR box" in given_up.error
    assert leases.out == 0


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_task_is_closed_exactly_once_whatever_happens(data: st.DataObject) -> None:
    """Any order of answers, whole and in part, of deaths, copies and quarantines."""
    plan = plan_of(data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)))
    capacity = Capacity(3, data.draw(st.integers(3, 6)))
    with tempfile.TemporaryDirectory() as folder:
        leases = Leases(
            plan, Ledger(Store(f"file://{folder}"), "d" * 64, plan.slabs, "r"), range(plan.slabs), began=0.0
        )
        closed: list[int] = []
        copies: list[Lease] = []
        now = 0.0
        for _ in range(1000):
            now += data.draw(st.sampled_from([0.1, 2.0, 100.0]))
            while (lease := leases.next(now, capacity)) is not None:
                copies.append(lease)
            assert len(copies) <= capacity.slots
            assert not any(lease.alone for lease in copies) or len(copies) == 1
            if not leases.out:
                break
            lease = copies.pop(data.draw(st.integers(0, len(copies) - 1)))
            if data.draw(st.integers(0, 9)) == 0:
                found = leases.died(lease)
            else:
                state = QUARANTINED if data.draw(st.integers(0, 9)) == 0 else WRITTEN
                found = leases.ended(
                    lease,
                    done(
                        lease.span[: data.draw(st.integers(0, len(lease.span)))],
                        data.draw(st.sampled_from([0.01, 1.0, 30.0])),
                        state,
                    ),
                )
            closed += [receipt.index for receipt in found]
            if lease.closed:
                copies = [other for other in copies if other is not lease]
        assert sorted(closed) == list(range(plan.slabs))


def test_skipped_tasks_do_not_teach_what_is_slow(ledger_of: object) -> None:
    """After empty slabs, which end in milliseconds, the first real one is not late, however long it takes."""
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 24, 1)
    while (lease := take(leases, 0.0, capacity)).span.stop < 24:
        leases.ended(lease, done(lease.span, 0.001, SKIPPED))
    assert leases.next(1e6, capacity) is None, "nothing was written yet, so nothing can be late"


def test_a_lease_has_no_more_copies_than_there_are_workers(ledger_of: object) -> None:
    """A third copy beside two that run would have no worker to go to."""
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 2, 1)
    measured(leases, 1.0, capacity)
    slow = take(leases, 0.0, capacity)
    assert leases.next(1e3, capacity) is slow, "a second copy, on the other worker"
    assert leases.next(1e6, capacity) is None
    assert leases.next(2e6, Capacity(3, 3)) is slow, "a third one when a third worker has come"
    leases.ended(slow, done(slow.span, 1.0))
    assert not leases.out


def test_a_slow_copy_that_nobody_waits_for_frees_its_place(ledger_of: object) -> None:
    """The first answer closes a lease; the place of its other copy is free again, however often that happens."""
    capacity = Capacity(2, 4)
    leases = begun(ledger_of, 1, 40)
    measured(leases, 0.01, capacity)
    for n in range(3 * capacity.slots):
        now = 1000.0 * (n + 1)
        lease = take(leases, now, capacity)
        assert take(leases, now + 500, capacity) is lease, "late, so a second worker has it"
        leases.ended(lease, done(lease.span[:1], 0.01))
        assert lease.closed


def test_suspects_run_one_at_a_time_and_are_not_started_again(ledger_of: object) -> None:
    """However late it is and however many workers are idle: what runs beside the guilty task may die of it."""
    capacity = Capacity(2, 4)
    leases = begun(ledger_of, 3, 1)
    measured(leases, 1.0, capacity)
    for lease in [take(leases, 0.0, capacity), take(leases, 0.0, capacity)]:
        assert leases.died(lease) == ()
    first = take(leases, 0.0, capacity)
    assert first.alone
    assert leases.next(0.0, capacity) is None
    assert leases.next(1000.0, capacity) is None
    leases.ended(first, done(first.span, 1.0))
    second = take(leases, 2000.0, capacity)
    assert second.alone
    assert second.span != first.span
    assert leases.next(3000.0, capacity) is None
    leases.ended(second, done(second.span, 1.0))
    assert leases.out == 0


def test_the_ramp_begins_with_the_run(ledger_of: object) -> None:
    """Not with the machine's clock: `began` is any number."""
    plan = plan_of(1000, 1)
    capacity = Capacity(1024, 2048)
    leases = Leases(plan, ledger_of(plan), range(plan.slabs), began=5000.0)  # type: ignore[operator]
    for _ in range(FIRST):
        take(leases, 5000.0, capacity)
    assert leases.next(5000.0, capacity) is None
    assert leases.next(5000.0 + 1.5 / MIN_PER_S, capacity) is not None


def test_a_ramp_goes_on_through_all_stages(ledger_of: object) -> None:
    """The pyramid's blocks need no ramp of their own, and what a store refused of slabs counts for them."""
    plan, capacity = plan_of(1000, 1), Capacity(1024, 2048)
    ramp = Ramp(0.0)
    ramp.limit(FULL_S, capacity.slots)
    leases = Leases(plan, ledger_of(plan), range(plan.slabs), 0.0, ramp)  # type: ignore[operator]
    for _ in range(FIRST + 1):
        take(leases, FULL_S, capacity)


def test_refusals_of_a_lease_s_worker_slow_the_ramp_down(ledger_of: object) -> None:
    """Also those of a copy that came too late to count."""
    capacity = Capacity(1024, 2048)
    leases = begun(ledger_of, 1000, 1)
    out = [take(leases, 0.0, capacity) for _ in range(FIRST)]
    leases.seen(out[0], 20.0, tasks=1, refused=5)
    assert leases.next(20.0, capacity) is None
    for lease in out[:10]:
        leases.ended(lease, done(lease.span, 20.0))
    for _ in range(10):
        take(leases, 20.0, capacity)
    assert leases.next(20.0, capacity) is None


def test_many_late_leases_are_found_in_one_look(ledger_of: object) -> None:
    """At the end of a large run thousands are late at once: each is not looked for among all others."""
    capacity = Capacity(500, 500)
    leases = begun(ledger_of, 400, 1)
    measured(leases, 1.0, capacity)
    out = []
    while (lease := leases.next(1e3, capacity)) is not None:
        out.append(lease)
    looks = 0

    class Counted(dict[Lease, None]):
        def __iter__(self) -> Iterator[Lease]:
            nonlocal looks
            looks += 1
            return super().__iter__()

    leases._out = Counted(leases._out)
    late = []
    while (lease := leases.next(2e3, capacity)) is not None:
        late.append(lease)
    assert late == out
    assert len(late) == 399
    assert looks == 1


def test_a_copy_whose_worker_died_is_made_up_for_by_the_other(ledger_of: object) -> None:
    capacity = Capacity(2, 4)
    leases = begun(ledger_of, 2, 1)
    measured(leases, 1.0, capacity)
    lease = take(leases, 0.0, capacity)
    assert take(leases, 1000.0, capacity) is lease
    assert leases.ended(lease, []) == ()
    assert not lease.closed
    assert leases.next(1000.0, capacity) is None
    assert [r.index for r in leases.ended(lease, done(lease.span, 1.0))] == list(lease.span)
    assert leases.out == 0


def test_a_lease_whose_every_copy_died_is_split(ledger_of: object) -> None:
    """The first death of two says nothing: the other copy may still answer."""
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 1, 4)
    measured(leases, 0.01, capacity)
    lease = take(leases, 0.0, capacity)
    assert take(leases, 1000.0, capacity) is lease
    assert leases.died(lease) == ()
    assert not lease.closed
    assert leases.died(lease) == ()
    assert lease.closed
    assert [take(leases, 1000.0, capacity).span for _ in range(3)] == [range(i, i + 1) for i in (1, 2, 3)]


def test_the_measured_mean_follows_slowly(ledger_of: object) -> None:
    """One slow answer of 3 s beside 1 s counts three tenths: 1.6 s a task, 3 tasks in 5 s."""
    capacity = Capacity(1, 1)
    leases = begun(ledger_of, 400, 3)
    measured(leases, 1.0, capacity)
    second = take(leases, 0.0, capacity)
    assert second.span == range(1, 3)
    leases.ended(second, done(second.span, 3.0))
    assert len(take(leases, 0.0, capacity).span) == 3


def test_half_finished_leases_come_back_whole_and_in_order(ledger_of: object) -> None:
    """A rest that is longer than a lease may be now is cut, and its end comes next."""
    capacity = Capacity(1, 1)
    leases = begun(ledger_of, 100, 60)
    measured(leases, 0.1, capacity)
    first, second = take(leases, 0.0, capacity), take(leases, 0.0, capacity)
    assert (first.span, second.span) == (range(1, 51), range(51, 60))
    leases.ended(first, done(first.span[:1], 2.0))
    leases.ended(second, done(second.span[:1], 2.0))
    spans = []
    while not spans or spans[-1].stop < 60:
        lease = take(leases, 0.0, capacity)
        spans.append(lease.span)
        leases.ended(lease, done(lease.span, 1.0))
    assert [i for span in spans for i in span] == [*range(2, 51), *range(52, 60)]


def test_tasks_that_came_back_count_as_left(ledger_of: object) -> None:
    """Near the end a lease is a quarter of what is left here: of 20 tasks 5; 4 come back, and 19 are left."""
    capacity = Capacity(1, 1)
    leases = begun(ledger_of, 1, 21)
    measured(leases, 1.0, capacity)
    lease = take(leases, 0.0, capacity)
    assert lease.span == range(1, 6)
    leases.ended(lease, done(lease.span[:1], 1.0))
    assert take(leases, 0.0, capacity).span == range(2, 6), "19 // 4"
    assert take(leases, 0.0, capacity).span == range(6, 9), "15 // 4"


def test_tasks_whose_worker_died_count_as_left(ledger_of: object) -> None:
    capacity = Capacity(1, 1)
    leases = begun(ledger_of, 1, 21)
    measured(leases, 1.0, capacity)
    lease = take(leases, 0.0, capacity)
    assert lease.span == range(1, 6)
    leases.died(lease)
    for index in range(1, 6):
        single = take(leases, 0.0, capacity)
        assert single.span == range(index, index + 1)
        leases.ended(single, done(single.span, 1.0))
    assert take(leases, 0.0, capacity).span == range(6, 9), "15 // 4"


def test_when_a_late_lease_is_looked_for_again(ledger_of: object) -> None:
    """Once a second at most, for that looks at every lease that is out."""
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 2, 1)
    measured(leases, 1.0, capacity)
    stuck = take(leases, 0.0, capacity)
    assert leases.next(8.9, capacity) is None
    assert leases.next(9.1, capacity) is None, "late by now, and looked at a moment ago"
    assert leases.next(9.95, capacity) is stuck


def test_a_lease_that_gives_back_what_it_has_no_time_for_is_not_waited_for_longer(ledger_of: object) -> None:
    """6 tasks behind 7 others, 2 s each, are two leases of 5 s at most: late after 3 times (10 + 2) s, not (26 + 2)."""
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 1, 60)
    measured(leases, 0.1, capacity)
    first, stuck = take(leases, 0.0, capacity), take(leases, 0.0, capacity)
    assert (len(first.span), len(stuck.span), stuck.tasks_ahead) == (7, 6, 7)
    leases.ended(first, done(first.span, 2.0))
    while leases.out == 1:
        if (lease := leases.next(35.0, capacity)) is None:
            break
        leases.ended(lease, done(lease.span, 2.0))
    assert leases.out == 1
    assert leases.next(37.0, capacity) is stuck


def test_slow_tasks_say_what_is_late(ledger_of: object) -> None:
    """The ninth of ten: of eleven tasks two took 4 s, so a single one is late after 3 times (4 + 4) s, not (1 + 1)."""
    capacity = Capacity(2, 2)
    leases = begun(ledger_of, 12, 1)
    stuck = take(leases, 0.0, capacity)
    for i in range(11):
        lease = take(leases, 0.0, capacity)
        leases.ended(lease, done(lease.span, 4.0 if i in (3, 7) else 1.0))
    assert leases.next(23.0, capacity) is None
    assert leases.next(25.0, capacity) is stuck
