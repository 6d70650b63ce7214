"""Before a run writes anything: a worker has come, all have this emsr, and one can open the job."""

from __future__ import annotations

import itertools
import sys
import time
import uuid
from collections.abc import Callable

from distributed import Client, KilledWorker

from pipeline.base.errors import ClusterError
from pipeline.cluster.connect import may_come, refuse_other_versions
from pipeline.worker.job import Job

NO_WORKER_S = 300.0
"""A run ends after so many seconds without a worker, unless a batch system may still give one."""
SAY_S = 20.0


def check_workers(client: Client, job: Job, check: Callable[[Job], int]) -> None:
    """Let one worker `check` the job, so that mistakes come before anything is written.

    They are paths that workers do not see, weights that do not fit, a cell larger than their memory. Raises
    ClusterError where no worker answers or workers have another emsr, and whatever `check` raises.
    """
    _wait_for_worker(client)
    refuse_other_versions(client)
    # The key is this run's own: another client's check of the same plan, perhaps of another target, is not this one.
    try:
        client.submit(check, job, key=f"check-{job.digest[:8]}-{uuid.uuid4().hex[:8]}", pure=False).result(
            timeout=NO_WORKER_S
        )
    except TimeoutError:
        raise ClusterError(
            f"no worker answered in {NO_WORKER_S:.0f} s",
            "at least one Dask worker",
            "Start workers, then run the same command again",
        ) from None
    except KilledWorker:
        raise ClusterError(
            "workers die while they open the job", "workers with memory for the network", "See their logs"
        ) from None


def _wait_for_worker(client: Client) -> None:
    """Wait for one, as long as it takes while a batch system has it in its queue."""
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


def no_worker() -> ClusterError:
    """The error of a run that has had no worker for NO_WORKER_S."""
    return ClusterError(
        f"no worker for {NO_WORKER_S:.0f} s",
        "at least one Dask worker",
        "Start workers, or see the logs of those that ended; then run the same command again",
    )
