"""Faults of one slab: it raises, hangs, or takes all memory."""

from __future__ import annotations

from collections.abc import Callable

from fault_scene import Scene, hold

from pipeline.plan.receipt import PENDING, QUARANTINED
from pipeline.prepare import recorded


def _bad_slab(kind: str, words: str) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        scene.write(work__stall_s=15, work__retries=1)
        task_number = str(scene.rng.randrange(4))
        scene.run(1, words, FAULT_TASK=task_number, FAULT_KIND=kind, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="1")
        found = recorded.read(scene.place.as_uri(), "harness")
        assert found is not None
        failed = list(found.ledger.indices(QUARANTINED))
        hold(failed == [int(task_number)], "wrong answer", f"quarantined: {failed}")
        hold(not found.ledger.count(PENDING, range(found.slabs)), "not closed", "the rest is finished")
        mark = scene.log.stat().st_size
        scene.run()
        again = {task for task, _ in scene.lines("begin", mark)}
        hold(again == {int(task_number)}, "wrong answer", f"repeated: {again}")

    return fault


slab_fails = _bad_slab("fail", "this slab always fails")
slab_fails.__doc__ = "One slab always raises: it is quarantined, the rest finishes, the same command repeats it."
slab_hangs = _bad_slab("hang", "no progress for 15 s")
slab_hangs.__doc__ = "One slab hangs while it holds the device: it is given up after work.stall_s, its worker replaced."
slab_exhausts_memory = _bad_slab("exhaust", "its worker died on every try")
slab_exhausts_memory.__doc__ = "One slab allocates until its worker is killed, on every try."
