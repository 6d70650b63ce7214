"""Before a run writes anything: workers have come, and those are known that can do the job."""

from __future__ import annotations

import itertools
import sys
import time

from distributed import Client

from pipeline.base.errors import ClusterError
from pipeline.cluster import steady_clock
from pipeline.cluster.connect import may_come, shorten_logs, stop_profiling
from pipeline.schedule.crew import NO_WORKER_S, Crew, no_worker

SAY_S = 20.0
GRACE_S = 30.0
"""Once a worker has answered, others are waited for this long. Those that answer later join the run then."""


def check_workers(client: Client, crew: Crew) -> None:
    """Ask the workers whether they can do the job, so that mistakes come before anything is written.

    They are paths that workers do not see, weights that do not fit, a cell larger than their memory, another emsr.
    Raises ClusterError where no worker answers, and where none is fit what they raised.
    """
    wait_for_worker(client)
    began = said = time.monotonic()
    answered: float | None = None
    while True:
        crew.look()
        now = time.monotonic()
        if answered is None and crew.answered:
            answered = now
        if crew.answered and (not crew.unanswered or (answered is not None and now - answered > GRACE_S)):
            crew.settle()
            if crew.capacity().workers:
                return
        if now - began > NO_WORKER_S and not crew.answered and not may_come(client):
            raise ClusterError(
                f"no worker answered in {NO_WORKER_S:.0f} s",
                "at least one Dask worker",
                "Start workers, then run the same command again",
            )
        if now - said > SAY_S:
            said = now
            print(f"emsr: waiting for {crew.unanswered} of {crew.present} workers to open the job", file=sys.stderr)
        time.sleep(0.1)


def wait_for_worker(client: Client) -> None:
    """Wait for one, as long as it takes while a batch system has it in its queue; then set scheduler and workers up."""
    _wait(client)
    shorten_logs(client)
    stop_profiling(client)
    steady_clock.install_everywhere(client)


def _wait(client: Client) -> None:
    possible = time.monotonic()
    for attempt in itertools.count():
        try:
            return client.wait_for_workers(1, timeout=SAY_S)  # type: ignore[no-any-return]
        except TimeoutError:
            if not attempt:
                print("emsr: waiting for the first worker", file=sys.stderr)
            if may_come(client):
                possible = time.monotonic()
            elif time.monotonic() - possible > NO_WORKER_S:
                raise no_worker() from None
