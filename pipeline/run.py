"""The main job: `python -m pipeline.run volume.yaml [--dry-run]`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import FrameType

from distributed import Client

from pipeline.base.command import INTERRUPTED, guarded, handling
from pipeline.cluster.connect import batch_job, connect, worker_count
from pipeline.config import urls, volume
from pipeline.config.volume import Config
from pipeline.plan.receipt import QUARANTINED
from pipeline.prepare.dry_run import print_price
from pipeline.prepare.place import check_place, claim
from pipeline.prepare.prepare import prepare
from pipeline.prepare.prepared import Prepared
from pipeline.schedule import report
from pipeline.schedule.check_workers import check_workers
from pipeline.schedule.execute import execute
from pipeline.schedule.progress import RunProgress, SurveyProgress
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals
from pipeline.sections import bad_sections
from pipeline.sections.survey import Survey, delete_measurements, detect
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import TargetLock
from pipeline.storage.volume import Source
from pipeline.worker.lease import check_job, process_lease


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run",
        description="Super-resolve the volume that volume.yaml names. Run again to resume.",
    )
    parser.add_argument("volume", help="path of volume.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the price and touch nothing")
    args = parser.parse_args(argv)
    return guarded(lambda: run(volume.load(args.volume), dry_run=args.dry_run))


def run(config: Config, dry_run: bool = False) -> int:
    """Run or resume the volume of `config`; with `dry_run`, print its price and write nothing. Returns the exit code.

    It is 0 when all tasks are written or skipped, or after a dry run; 1 when some are quarantined; 130 when the run was
    interrupted with tasks left. Raises UserError.
    """
    prepared = prepare(config, lambda survey, source: _detect(config, survey, source, keep=not dry_run))
    resumed = check_place(prepared)
    if dry_run:
        return _dry_run(prepared)
    run_id = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + uuid.uuid4().hex[:6]
    prepared = replace(prepared, job=replace(prepared.job, run=run_id))
    job = prepared.job
    lock = TargetLock(prepared.store, run_id)
    lock.refuse_others()
    ledger = Ledger(prepared.store, job.digest, job.plan.tasks, run_id)
    if resumed:
        ledger.load()
        ledger.requeue(QUARANTINED)
        if not ledger.counts()["pending"]:
            print(f"{job.target.url} is complete: {_sum(ledger)}")
            return 0
    with connect(config.cluster, config.work.in_flight) as client:  # first: a mistake there leaves no trace
        check_workers(client, job, check_job)
        lock.acquire()
        try:
            claim(prepared)
            ledger.load()  # again: another run may have ended in between
            return _execute(prepared, RunState(job, ledger, lock), client)
        finally:
            lock.release()


def _dry_run(prepared: Prepared) -> int:
    config = prepared.config
    job = batch_job(config.cluster, config.work.in_flight)
    for line in bad_sections.describe(prepared.spec["source"]["bad_sections"]):
        print(line)
    print_price(prepared, worker_count(config.cluster))
    if job is not None:
        print(f"each worker\n\n{job}")
    return 0


def _detect(config: Config, survey: Survey, source: Source, keep: bool) -> dict[int, str]:
    """The pass that looks for bad sections. A run that refuses them keeps nothing of it: they will be mended."""
    store = Store(urls.sidecar(config.target.url))
    with SurveyProgress(len(survey.sections)) as progress:
        bad = detect(survey, source, store, keep, progress.update)
    if keep and bad and config.source.bad_sections.rule == "refuse":
        delete_measurements(survey, store)
    return bad


def _execute(prepared: Prepared, run: RunState, client: Client) -> int:
    plan, ledger, lock = run.job.plan, run.ledger, run.lock
    assert lock is not None
    again = ledger.requeue(QUARANTINED)
    before = ledger.counts()
    done = before["written"] + before["skipped"]
    with RunProgress(ledger.tasks, done) as progress, _interruptible(run, progress):
        progress.say("plan", slabs=plan.slabs, pyramid_blocks=plan.tasks - plan.slabs, done=done, retried=again)
        progress.say("cluster", workers=len(client.nthreads()), dashboard=client.dashboard_link)

        def show(totals: RunTotals) -> None:
            progress.update(totals)
            totals.dropped_lines = progress.dropped
            lock.workers = {name: asdict(did) for name, did in totals.workers.items()}

        execute(client, run, process_lease, show)
        sheet = report.write(prepared, run)
        if bad := prepared.spec["source"]["bad_sections"]:
            shown = {z: one["why"] for z, one in list(bad.items())[: bad_sections.MAX_SHOWN]}
            progress.say("bad_sections", count=len(bad), **shown)
        progress.say("ledger", planned=ledger.tasks, **ledger.counts())
        progress.say("report", report=f"{prepared.store.url}/report.json", contact_sheet=sheet)
    return _verdict(run)


def _verdict(run: RunState) -> int:
    ledger, counts = run.ledger, run.ledger.counts()
    if run.interrupted and counts["pending"]:
        left = f"{counts['pending']} of {ledger.tasks} tasks are left"
        print(f"emsr: stopped; {left}. Run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    if counts["quarantined"]:
        first = next(ledger.indices(QUARANTINED))
        print(
            f"emsr: {counts['quarantined']} of {ledger.tasks} tasks are quarantined, "
            f"{counts['pending']} wait for them; the first is {first}: {ledger.why(first).first_line}. "
            "Mend the cause and run the same command again: only these are repeated.",
            file=sys.stderr,
        )
        return 1
    print(f"done: {_sum(ledger)}")
    return 0


def _sum(ledger: Ledger) -> str:
    counts = ledger.counts()
    ended = " + ".join(f"{counts[state]} {state}" for state in ("written", "skipped", "quarantined"))
    return f"{ledger.tasks} planned = {ended}"


@contextmanager
def _interruptible(run: RunState, progress: RunProgress) -> Iterator[None]:
    """The first signal drains, a second Ctrl-C or SIGTERM ends at once; the target can be resumed after either.

    SIGHUP and SIGXCPU come several times by themselves: their number says nothing.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        if not run.stop.is_set():
            run.stop.set()
            name = signal.Signals(number).name
            progress.say("stopping", signal=name, now="slabs in flight are finished; once more to end at once")
        elif number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt

    with handling(handler):
        yield


if __name__ == "__main__":
    sys.exit(main())
