"""Before a run writes anything: workers have come, and those are known that can do the job."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from distributed import Client

from pipeline.cluster.connect import may_come, why_none
from pipeline.schedule.absence import NO_WORKER_S, SAY_S
from pipeline.schedule.crew import Crew

LOOK_S = 5.0
GRACE_S = 30.0
"""Once a worker has answered, others are waited for this long. Those that answer later join the run then."""


def check_workers(client: Client, crew: Crew) -> None:
    """Ask the workers whether they can do the job, so that mistakes come before anything is written.

    They are paths that workers do not see, weights that do not fit, a cell larger than their memory, another emsr.
    Raises ClusterError where no worker answers, and where none is fit what they raised.
    """
    wait_for_worker(client, crew)
    began = said = time.monotonic()
    answered: float | None = None
    while True:
        crew.look()
        for line in crew.says():
            print(f"emsr: {line}", file=sys.stderr)
        now = time.monotonic()
        if answered is None and crew.answered:
            answered = now
        if crew.answered and (not crew.unanswered or (answered is not None and now - answered > GRACE_S)):
            crew.settle()
        if crew.capacity().workers:  # perhaps later than that: a worker may be paused, or gone, and another one come
            return
        if now - began > NO_WORKER_S and not crew.answered and not may_come(client):
            raise crew.absence.none_answered(NO_WORKER_S)
        if now - said > SAY_S:
            said = now
            print(f"emsr: waiting for {crew.unanswered} of {crew.present} workers to open the job", file=sys.stderr)
        time.sleep(0.1)


def wait_for_worker(client: Client, crew: Crew) -> None:
    """Wait for one, as long as it takes while a batch system has it in its queue. One that is paused is none.

    Raises ClusterError where none comes.
    """
    began = possible = time.monotonic()
    say_s = SAY_S
    while True:
        with suppress(TimeoutError):
            client.wait_for_workers(1, timeout=LOOK_S)
            return
        crew.look_for_paused()
        for line in crew.says():
            print(f"emsr: {line}", file=sys.stderr)
        now = time.monotonic()
        if now - began >= say_s - LOOK_S:
            say_s *= 2
            why = why_none(client)
            print(f"emsr: waiting for the first worker{why and ': '}{why}", file=sys.stderr)
        if may_come(client):
            possible = now
        elif now - possible > NO_WORKER_S:
            raise crew.absence.none_came()
