"""`python -m pipeline.verify volume.yaml`: all that is recorded is looked for, and held against what was recorded."""

from __future__ import annotations

import argparse
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace

from emsr import start
from pipeline.base.command import INTERRUPTED, guarded
from pipeline.base.errors import EmsrError
from pipeline.base.words import counted
from pipeline.cluster.connect import connect, slabs_in_flight, tune
from pipeline.config import volume as configuration
from pipeline.config.volume import Config
from pipeline.plan.receipt import PENDING, QUARANTINED, STATES
from pipeline.prepare import stored_plan
from pipeline.prepare.place import check_begun, damaged_objects
from pipeline.prepare.prepare import prepare
from pipeline.prepare.prepared import Prepared
from pipeline.schedule.check_workers import wait_for_worker
from pipeline.schedule.crew import Crew
from pipeline.schedule.execute import hand_out
from pipeline.schedule.findings import Findings
from pipeline.schedule.in_flight import InFlight
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals
from pipeline.schedule.verify_progress import VerifyProgress
from pipeline.schedule.worker_waits import WorkerWaits
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import TargetLock
from pipeline.storage.targets.extra_objects import extra_objects
from pipeline.storage.targets.open import open_target
from pipeline.worker.stored import ReadLease, view

SHOWN = 1000
"""So many lines are printed of each kind; the sums tell the rest."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=start.program("verify"),
        description="Read the target's objects again and compare them with what was written.",
    )
    parser.add_argument("volume", help="path of volume.yaml")
    parser.add_argument("--sample", type=int, metavar="N", help="check N tasks chosen at random instead of all")
    parser.add_argument(
        "--requeue", action="store_true", help="mark damaged tasks as pending, so that the next run writes them again"
    )
    args = parser.parse_args(argv)
    return guarded(lambda: verify(configuration.load(args.volume), args.sample, args.requeue))


def verify(config: Config, sample: int | None = None, requeue: bool = False) -> int:
    """Exit code 0 when all that is recorded is there and right and the ledger is closed, 130 when it was interrupted,
    1 otherwise. With `sample` that is said of so many tasks. Raises UserError.
    """
    run_id = time.strftime("%Y%m%dT%H%M%S-verify-", time.gmtime()) + uuid.uuid4().hex[:6]
    prepared = prepare(config)
    prepared = replace(prepared, job=replace(prepared.job, run=run_id))
    check_begun(prepared)
    lock = TargetLock(prepared.store, run_id) if requeue else None
    with ExitStack() as held:
        if lock is not None:  # from here to the end: a run that ended in between would lose its records or ours
            lock.acquire()
            held.callback(lock.release)
        return _verify(prepared, lock, sample)


def _verify(prepared: Prepared, lock: TargetLock | None, sample: int | None) -> int:
    job = prepared.job
    said = _Said()
    objects = damaged_objects(prepared)
    for key, why in objects.items():
        said("damaged", key, why)
    hold = {} if lock is None else {"hold": lock.hold}
    ledger = Ledger(prepared.store, job.digest, job.plan.tasks, job.run, **hold)
    ledger.load()
    findings = Findings(
        job.plan, ledger, lambda word, task, why: said(word, f"task {task}", why), lock is not None, sample
    )
    interrupted = _read_all(prepared, RunState(job, ledger, lock), findings)
    extra = 0 if interrupted or sample is not None else _tell_extra(prepared, ledger, said)
    for key in ledger.damaged:
        said("lost", key, "these records of the ledger cannot be read")
    said.rest()
    counts = ledger.counts()
    print(
        f"verified     {findings.looked_at:,} of {findings.written:,} written tasks, {findings.damaged:,} damaged, "
        f"{findings.unreadable:,} cannot be read; {len(objects)} of the metadata damaged; ledger: "
        + ", ".join(f"{counts[k]:,} {k}" for k in STATES)
    )
    _advise(findings, objects, lock is not None)
    for line in _unfinished(ledger, prepared, findings.damaged if lock is not None else 0):
        print(line)
    if interrupted:
        print("emsr: stopped: the rest was not looked at", file=sys.stderr)
        return INTERRUPTED
    wrong = findings.damaged or findings.unreadable or objects or extra
    return 1 if wrong or counts["pending"] or counts["quarantined"] else 0


def _read_all(prepared: Prepared, run: RunState, findings: Findings) -> bool:
    """Have workers read every task that is pending in `findings`. Returns whether that was interrupted."""
    local = prepared.config.cluster.kind == "local"
    keys = [stored_plan.KEY, *filter(None, [run.ledger.newest_key()])]
    try:
        if not findings.count(PENDING):
            findings.close()
            return False
        work = ReadLease(view(run.job, keys), in_worker=not local)
        with connect(prepared.config.cluster, slabs_in_flight(prepared.config), to_read=True) as client:
            crew = Crew(client, tell=_tell_aside)
            wait_for_worker(client, crew)
            if prepared.config.cluster.tunes():
                tune(client)
            waits = WorkerWaits(client, run.job.run)
            with VerifyProgress(findings) as progress:

                def show(totals: RunTotals) -> None:
                    totals.waits += waits.take()
                    progress.update(totals)

                in_flight = InFlight(client, run.job, work, crew, run.hold)
                hand_out(run, in_flight, findings, run.job.plan.passes(), show)
    except KeyboardInterrupt:
        return True
    return False


def _tell_aside(who: str, why: str) -> None:
    print(f"emsr: set aside: {who}: {why}", file=sys.stderr)


def _tell_extra(prepared: Prepared, ledger: Ledger, said: _Said) -> int:
    """Say what lies in the target that the ledger does not know; returns how much of it makes the target wrong."""
    wrong = 0
    try:
        for key, task in extra_objects(open_target(prepared.job.target), prepared.job.plan, ledger):
            if task is None:
                said("extra", key, "no object of this target; nothing reads it")
            else:
                said("extra", key, f"task {task} was skipped, and readers see this object: delete it")
                wrong += 1
    except EmsrError as error:
        said("unreadable", "the list of objects", str(error))
        wrong += 1
    return wrong


def _advise(findings: Findings, objects: dict[str, str], requeued: bool) -> None:
    if findings.damaged and requeued:
        print(f"requeued     {counted(findings.damaged, 'task')}; run emsr run to write them again")
    elif findings.damaged:
        print("Run again with --requeue, then emsr run, to write them again")
    if objects:
        print("Run emsr run to write plan.json and the metadata again")


def _unfinished(ledger: Ledger, prepared: Prepared, requeued: int) -> list[str]:
    """What a run has not written yet, and what it gave up."""
    plan, lines = prepared.job.plan, []
    if ledger.count(PENDING) > requeued:
        names = ["slabs", *(f"blocks of mip {level}" for level in plan.second_pass)]
        left = [
            f"{ledger.count(PENDING, stage):,} of {len(stage):,} {name}"
            for stage, name in zip(plan.passes(), names, strict=True)
            if ledger.count(PENDING, stage)
        ]
        lines.append(f"unfinished   {', '.join(left)} are not written yet; run emsr run to go on")
    if quarantined := ledger.count(QUARANTINED):
        lines.append(f"unfinished   {quarantined:,} tasks are quarantined; status tells why")
    return lines


class _Said:
    """Lines of what is wrong, SHOWN of each kind."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def __call__(self, word: str, what: str, why: str) -> None:
        self._counts[word] = count = self._counts.get(word, 0) + 1
        if count <= SHOWN:
            print(f"{word:<12} {what}: {why}", flush=True)

    def rest(self) -> None:
        """Say how many lines were left out."""
        for word, count in self._counts.items():
            if count > SHOWN:
                print(f"{word:<12} and {count - SHOWN:,} more")


if __name__ == "__main__":
    sys.exit(main())
