"""How many leases may be out: when a run begins, and where a store refuses. Decisions, without Dask or clock."""

from __future__ import annotations

import pytest

from pipeline.schedule.ramp import BACK, FIRST, FULL_S, LOOK_S, MIN_PER_S, SLOWER, Ramp


@pytest.mark.parametrize("slots", [3 * 1024, 30_000, 300_000])
def test_the_ramp_ends_in_two_minutes_whatever_the_crew(slots: int) -> None:
    ramp = Ramp(0.0)
    assert ramp.limit(0.0, slots) == FIRST
    halfway = ramp.limit(FULL_S / 2, slots)
    assert halfway == pytest.approx(FIRST + max(slots / FULL_S, MIN_PER_S) * FULL_S / 2)
    assert ramp.limit(FULL_S, slots) == slots


def test_few_workers_are_all_busy_at_once() -> None:
    """There is no ramp for a crew that no store notices, and no step back either."""
    ramp = Ramp(0.0)
    assert ramp.limit(0.0, FIRST) == FIRST
    ramp.ended(LOOK_S, FIRST, 1.0, 1, 1000)
    assert ramp.limit(LOOK_S, FIRST) == FIRST


def test_the_ramp_steps_back_where_the_store_refuses_and_then_rises_slowly() -> None:
    """12,000 slots rise by 100 a second. Refusals are weighed every ten seconds; more than one for a task is too many.

    The next step waits for leases that began after the first one (20 s here): those before it may still be refused.
    """
    slots, ramp = 12_000, Ramp(0.0)
    before = ramp.limit(30.0, slots)
    assert before == FIRST + 3000
    ramp.ended(30.0, 3000, 20.0, 10, 11)
    assert ramp.limit(30.0, slots) == BACK * 3000
    ramp.ended(45.0, 3000, 20.0, 10, 1000)
    ramp.ended(49.0, 3000, 20.0, 10, 1000)
    assert ramp.limit(50.0, slots) == pytest.approx(BACK * 3000 * (1 + SLOWER))
    ramp.ended(60.0, 2000, 20.0, 10, 10)
    assert ramp.limit(70.0, slots) == pytest.approx(BACK * 3000 * (1 + SLOWER) ** 2)
    ramp.ended(70.0, 1600, 20.0, 10, 11)
    assert ramp.limit(70.0, slots) == BACK * 1600


def test_no_rise_undoes_a_step_back_before_its_effect_is_known() -> None:
    """A store that is asked for too much makes leases slow: in the hour that they take all slots could fill again."""
    slots, ramp, now, out = 30_000, Ramp(0.0), FULL_S, 30_000.0
    assert ramp.limit(now, slots) == out
    for _ in range(5):
        now += 3600 + LOOK_S
        ramp.ended(now, round(out), 3600.0, 10, 11)
        for minute in range(60):
            out = ramp.limit(now + 60 * minute, slots)
    assert out < slots / 10


def test_the_ramp_rises_on_where_the_store_refuses_little() -> None:
    slots, ramp = 12_000, Ramp(0.0)
    for second in range(10, 130, 10):
        ramp.ended(float(second), 3000, 1.0, 100, 100)
        assert ramp.limit(float(second), slots) == min(slots, FIRST + 100 * second)
