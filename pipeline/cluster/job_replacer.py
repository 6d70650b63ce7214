"""Jobs of a batch system that have ended, or were refused, are submitted again while the run lasts."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any

from pipeline.base.errors import ClusterError
from pipeline.cluster.batch_systems import System
from pipeline.cluster.job_submitter import JobSubmitter

LOOK_S = 15.0
"""How often the batch system is asked which jobs it has. Those that it has no more are submitted again."""
MAX_IN_VAIN = 3
"""Where so many jobs end one after the other before the worker of any has come, something is wrong with all of them."""


class JobReplacer:
    """Submits a job again that the batch system has no more: its walltime is over, its node is lost, or it ended before
    its worker came. So are jobs that were refused.

    A thread of its own, while the `with` lasts. A job that was refused, or ended before its worker came, is replaced
    later each time, until one is taken and comes.
    """

    def __init__(self, cluster: Any, system: System, submitter: JobSubmitter) -> None:
        self._cluster, self.system, self.submitter = cluster, system, submitter
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_again, name="emsr-jobs", daemon=True)
        self._came: set[str] = set()
        self._failures, self._not_before = 0, 0.0
        self._told = ""
        self.in_vain: list[str] = []
        """Numbers of the jobs that ended before their worker came, since there was a worker."""

    def __enter__(self) -> JobReplacer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def numbers(self) -> set[str]:
        """The numbers of the cluster's jobs."""
        return {job.job_id for job in list(self._cluster.workers.values()) if job.job_id}

    def _look_again(self) -> None:
        while not self._ended.wait(LOOK_S):
            with suppress(ClusterError):  # the batch system does not answer: it is asked again
                self._look()

    def _look(self) -> None:
        workers = list(self._cluster.workers.items())
        jobs = {job.job_id: name for name, job in workers if job.job_id}
        refused = [name for name, job in workers if not job.job_id]
        there = {worker["name"] for worker in self._cluster.scheduler_info["workers"].values()}
        # The batch system is asked after the cluster: a job submitted in between is not missed.
        found = self.system.jobs() if jobs else {}
        if found is None:
            return
        if refused and jobs and self.submitter.refused != self._told:
            self._told = self.submitter.refused
            print(
                f"emsr: {self.system.name} takes {len(jobs)} of {len(workers)} jobs: {self._told}. The run goes on "
                "with these, and asks for the others again.",
                file=sys.stderr,
            )
        came = {number for number, name in jobs.items() if name in there} | self._came & jobs.keys()
        if came - self._came:
            self._failures = 0
        self._came = came
        if there:
            self.in_vain = []
        gone = jobs.keys() - found.keys()
        early = gone - came
        if time.monotonic() < self._not_before:
            gone, refused = gone - early, []
        elif early or refused:
            self._failures += 1
            self._not_before = time.monotonic() + LOOK_S * 2 ** min(self._failures, 6)
            self.in_vain += [] if there else sorted(early - set(self.in_vain))
        names = [jobs[number] for number in gone] + refused
        if names and len(self.in_vain) < MAX_IN_VAIN:
            self._cluster.sync(self._replace, {name: dict(workers)[name] for name in names})

    async def _replace(self, gone: dict[str, Any]) -> None:
        for name, job in gone.items():
            if self._cluster.workers.get(name) is job:
                del self._cluster.workers[name]
        self._cluster.scale(len(self._cluster.worker_spec))  # opens what is wanted and not there
