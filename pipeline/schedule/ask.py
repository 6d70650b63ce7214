"""A question that every worker answers in a moment, before the run knows what it will ask of them."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from distributed import Client, Future

from pipeline.base.errors import EmsrError
from pipeline.cluster.connect import may_come
from pipeline.cluster.patient_client import call
from pipeline.schedule.absence import NO_WORKER_S, SAY_S
from pipeline.schedule.check_workers import GRACE_S, wait_for_worker
from pipeline.schedule.crew import Crew
from pipeline.schedule.results import CHECKS, Results, pack, run_packed

LOOK_S = 0.2


T = TypeVar("T")


def ask_workers(client: Client, question: Callable[[], T], what: str) -> list[T]:
    """What the workers that are there answer to `question`; `what` is said to be waited for.

    Waits for the first worker as `wait_for_worker`, and GRACE_S for others once one has answered. Whoever raises an
    error is left out: what it lacks is found again, and said, when it is asked whether it is fit.

    Raises ClusterError where no worker comes, or none answers.
    """
    crew, prefix = Crew(client), f"ask-{uuid.uuid4().hex[:8]}"
    answers, asked = Results(client, prefix, CHECKS), dict[str, Future]()
    began = said = time.monotonic()
    first: float | None = None
    try:
        while True:
            wait_for_worker(client, crew)
            there = call(client.nthreads).keys()
            for address in there - asked.keys():
                key = f"{prefix}-{len(asked):x}"
                packed = pack(CHECKS, question)
                asked[address] = client.submit(run_packed, packed, key=key, pure=False, workers=[address], priority=1)
            crew.look_for_paused()
            for line in crew.says():
                print(f"emsr: {line}", file=sys.stderr)
            now, waits = time.monotonic(), [address for address in there if not asked[address].done()]
            if first is None and len(waits) < len(there):
                first = now
            if there and (not waits or (first is not None and now - first > GRACE_S)):
                break
            if first is None and now - began > NO_WORKER_S and not may_come(client):
                raise crew.absence.none_answered(NO_WORKER_S)
            if now - said > SAY_S:
                said = now
                print(f"emsr: waiting for {len(waits)} of {len(there)} workers to say {what}", file=sys.stderr)
            time.sleep(LOOK_S)
        ended = [answers.take(future.key) for future in asked.values()]
    finally:
        for future in asked.values():
            future.cancel()
        answers.close()
    return [each.outcome for each in ended if each is not None and not isinstance(each.outcome, EmsrError)]
