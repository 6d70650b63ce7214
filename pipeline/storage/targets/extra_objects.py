"""Objects that lie in a target and that its ledger does not know: other people's files, or what was written before."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.plan.plan import Plan
from pipeline.plan.receipt import SKIPPED
from pipeline.plan.task_states import TaskStates
from pipeline.storage.kv import Store
from pipeline.storage.targets.task_objects import object_keys
from pipeline.storage.volume import Target

LISTINGS = 1000
"""A target is listed in about so many parts, so that the keys of one part are in memory at a time."""


def extra_objects(target: Target, plan: Plan, tasks: TaskStates) -> Iterator[tuple[str, int | None]]:
    """(key, None) of each object that is none of this target's, (key, task) of each that is a skipped task's.

    Readers see the latter where the ledger says that there is nothing.
    """
    store, known = Store(target.spec.url), target.metadata()
    for start, stop in _parts(target, plan):
        for key in store.keys_between(start, stop):
            if key in known:
                continue
            place = target.locate(key)
            task = None if place is None else plan.task_at(*place)
            if task is None or tasks.state(task) == SKIPPED:
                yield key, task


def _parts(target: Target, plan: Plan) -> Iterator[tuple[str, str]]:
    """Ranges of keys, one after another, that hold about as many each: they are cut at keys of evenly chosen tasks."""
    step = max(1, plan.tasks // LISTINGS)
    cuts = sorted({object_keys(target, plan, task)[0] for task in range(step, plan.tasks, step)} if step > 1 else set())
    yield from zip(["", *cuts], [*cuts, ""], strict=True)
