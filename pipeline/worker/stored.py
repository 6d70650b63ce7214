"""What tasks have stored, read again: this is what Dask runs on a worker for `verify`."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, replace

from pipeline.base.errors import ClusterError, DataError, NoAnswerError, TransientError, UserError
from pipeline.base.retry import retrying
from pipeline.base.waits import heartbeat, no_answer
from pipeline.config import access, urls
from pipeline.plan.receipt import QUARANTINED, WRITTEN, Receipt
from pipeline.process import watchdog
from pipeline.process.resident_size import peak_resident_bytes
from pipeline.storage import requests
from pipeline.storage.kv import Store
from pipeline.storage.targets.open import open_target
from pipeline.storage.targets.task_objects import object_keys
from pipeline.storage.volume import Target
from pipeline.worker.job import Job, LeaseResult
from pipeline.worker.told import name, teller


@dataclass(frozen=True)
class View:
    """The CRC-32 of a few objects, by key; 0 where there is none.

    They are the target's metadata and what lies beside it. A process that has another view than the client looks at
    another place: what it finds missing says nothing of the target.
    """

    target: dict[str, int]
    sidecar: dict[str, int]


def view(job: Job, sidecar_keys: list[str]) -> View:
    """What this process sees of the job's target and of these objects beside it, asked as volume.yaml says."""
    access.use(job.target.url, job.access)
    target = open_target(job.target)
    places = (
        (Store(job.target.url), sorted(target.metadata())),
        (Store(urls.sidecar(job.target.url)), sidecar_keys),
    )
    return View(*({key: zlib.crc32(value or b"") for key, value in store.get_all(keys)} for store, keys in places))


@dataclass(frozen=True)
class ReadLease:
    """Reads the objects of tasks start .. stop-1 and gives a receipt for each. It is sent to workers.

    The receipt of a task whose objects could be read is of state WRITTEN; its checksum is that of what was found, its
    error names an object that is missing. One that cannot be read is QUARANTINED with the reason. `in_worker` says that
    the process may be ended where a read hangs.

    Raises ClusterError in a process that looks at another place than the client, UserError where it may not read there,
    NoAnswerError where it gets no answer to whether it does.
    """

    client_view: View
    in_worker: bool

    def check(self, job: Job) -> int:
        """Raises ClusterError where this process looks at another place than the client."""
        if view(job, sorted(self.client_view.sidecar)) != self.client_view:
            raise ClusterError(
                f"the worker {name()} sees something else at {job.target.url} than the client",
                "one place for all",
                "Mount the target there; where a run is writing its metadata, verify again",
            )
        return 0

    def __call__(self, job: Job, start: int, stop: int, max_s: float) -> LeaseResult:
        requests.limit(job.rates)
        receipts: list[Receipt] = []
        reading = False

        def tasks() -> None:
            nonlocal reading
            self.check(job)
            target, end = open_target(job.target), time.monotonic() + max_s
            reading = True
            for index in range(start, stop):
                if receipts and time.monotonic() >= end:
                    break
                receipts.append(replace(_read(target, job, index), worker=name()))
            reading = False
            if any(receipt.error for receipt in receipts):
                self.check(job)  # a disk that went away under way is no damage

        stall = watchdog.run_watched(tasks, job.stall_s, teller(job.run))
        ended = tuple(receipts)
        if stall is not None:
            if self.in_worker:
                watchdog.exit_soon()
            if not reading:
                raise no_answer(f"{name()} waits for {stall.what}", job.stall_s)
            on = f", waiting for {stall.what}" if stall.what else ""
            why = f"no progress for {job.stall_s:.0f} s (work.stall_s){on}, given up\n\n{stall.stack}"
            index, kind = start + len(ended), NoAnswerError.__name__
            ended += (Receipt(index, QUARANTINED, error=why, fault=kind, worker=name()),)
        return LeaseResult(ended, peak_resident_bytes(), 0, requests=requests.COUNTER.take())


def _read(target: Target, job: Job, index: int) -> Receipt:
    began = time.perf_counter()
    try:
        return retrying(lambda: _found(target, job, index, began), job.retries, requests.COUNTER.retry)
    except (DataError, TransientError, UserError) as error:
        kind = type(error).__name__
        return Receipt(index, QUARANTINED, error=str(error), fault=kind, seconds=time.perf_counter() - began)


def _found(target: Target, job: Job, index: int, began: float) -> Receipt:
    """The receipt of what is stored. The checksum is that of `task_objects.checksum`, an object at a time."""
    crc = size = 0
    missing: list[str] = []
    keys = object_keys(target, job.plan, index)
    for key, value in target.get(keys):
        heartbeat()
        if value is None:
            missing.append(key)
        else:
            crc = zlib.crc32(value, zlib.crc32(key.encode(), crc))
            size += len(value)
    error = f"{missing[0]} is missing ({len(missing)} of {len(keys)} objects are)" if missing else ""
    return Receipt(index, WRITTEN, crc, size, time.perf_counter() - began, error)
