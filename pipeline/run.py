"""The main job: `python -m pipeline.run volume.yaml [--dry-run]`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType

from distributed import Client

from pipeline.base.command import INTERRUPTED, guarded
from pipeline.cluster.connect import batch_job, connect, worker_count
from pipeline.config import volume as configuration
from pipeline.config.volume import Config
from pipeline.prepare.dry_run import print_price
from pipeline.prepare.prepare import Prepared, check_place, claim, prepare, sidecar
from pipeline.schedule import report
from pipeline.schedule.progress import RunProgress, SurveyProgress
from pipeline.schedule.schedule import Outcome, drive, rehearse
from pipeline.sections import bad_sections
from pipeline.sections import survey as section_survey
from pipeline.sections.survey import Survey
from pipeline.storage.kv import Store
from pipeline.storage.ledger import QUARANTINED, Ledger
from pipeline.storage.target_lease import TargetLease
from pipeline.storage.volume import Source


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.run",
        description="Super-resolve the volume that volume.yaml names. Run again to resume.",
    )
    parser.add_argument("volume", help="path of volume.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the price and touch nothing")
    args = parser.parse_args(argv)
    return guarded(lambda: run(configuration.load(args.volume), dry_run=args.dry_run))


def run(config: Config, dry_run: bool = False) -> int:
    """Exit code 0 when the ledger closes without quarantine, 1 with quarantined slabs, 130 after Ctrl-C."""
    prepared = prepare(config, lambda survey, source: _look(config, survey, source, keep=not dry_run))
    store = Store(sidecar(prepared.job.target.url))
    resumed = check_place(prepared, store)
    if dry_run:
        job = batch_job(config.cluster, config.work.in_flight)
        for line in bad_sections.describe(prepared.spec["source"]["bad_sections"]):
            print(line)
        print_price(prepared.job, prepared.source, config.work.in_flight, worker_count(config.cluster))
        if job is not None:
            print(f"each worker\n\n{job}")
        return 0
    run_id = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + uuid.uuid4().hex[:6]
    held = TargetLease(store, run_id)
    held.refuse_others()
    ledger = Ledger(store, prepared.job.digest, prepared.job.plan.tasks, run_id)
    if resumed:
        ledger.load()
        ledger.requeue(QUARANTINED)
        if not ledger.counts()["pending"]:
            print(f"{prepared.job.target.url} is complete: {_sum(ledger)}")
            return 0
    with connect(
        config.cluster, config.work.in_flight
    ) as client:  # before anything is written: a mistake there leaves no trace
        rehearse(client, prepared.job)
        held.acquire()
        try:
            claim(prepared, store)
            ledger.load()  # again: another run may have ended in between
            return _execute(config, prepared, store, ledger, held, client)
        finally:
            held.release()


def _look(config: Config, survey: Survey, source: Source, keep: bool) -> dict[int, str]:
    """The pass that looks for bad sections. A run that refuses them keeps nothing of it: they will be mended."""
    store = Store(sidecar(config.target.url))
    with SurveyProgress(len(survey.sections)) as progress:
        found = section_survey.detect(survey, source, store, keep, progress.update)
    if keep and found and config.source.bad_sections.rule == "refuse":
        section_survey.delete_measurements(survey, store)
    return found


def _execute(
    config: Config, prepared: Prepared, store: Store, ledger: Ledger, held: TargetLease, client: Client
) -> int:
    job, began = prepared.job, time.time()
    again = ledger.requeue(QUARANTINED)
    before = ledger.counts()
    done = before["written"] + before["skipped"]
    with RunProgress(ledger.tasks, done) as progress, _interruptible(progress) as stop:
        progress.say(
            "plan", slabs=job.plan.slabs, pyramid_blocks=job.plan.tasks - job.plan.slabs, done=done, retried=again
        )
        progress.say("cluster", workers=len(client.nthreads()), dashboard=client.dashboard_link)

        def seen(outcome: Outcome) -> None:
            progress.update(outcome)
            held.workers = {name: asdict(tally) for name, tally in outcome.workers.items()}

        outcome = drive(client, job, ledger, stop, held, seen)
        sheet = report.write(config, prepared, store, ledger, outcome, held.run_id, began)
        if bad := prepared.spec["source"]["bad_sections"]:
            progress.say(
                "bad_sections",
                count=len(bad),
                **{z: one["why"] for z, one in list(bad.items())[: bad_sections.MAX_SHOWN]},
            )
        progress.say("ledger", planned=ledger.tasks, **ledger.counts())
        progress.say("report", report=f"{store.url}/report.json", contact_sheet=sheet)
    return _verdict(ledger, outcome)


def _verdict(ledger: Ledger, outcome: Outcome) -> int:
    counts = ledger.counts()
    if outcome.interrupted and counts["pending"]:
        print(
            f"emsr: stopped; {counts['pending']} of {ledger.tasks} tasks are left. Run the same command again to go on.",
            file=sys.stderr,
        )
        return INTERRUPTED
    if counts["quarantined"]:
        first = next(ledger.indices(QUARANTINED))
        print(
            f"emsr: {counts['quarantined']} of {ledger.tasks} tasks are quarantined, {counts['pending']} wait for them; "
            f"the first is {first}: {ledger.why(first).first_line}. "
            "Mend the cause and run the same command again: only these are repeated.",
            file=sys.stderr,
        )
        return 1
    print(f"done: {_sum(ledger)}")
    return 0


def _sum(ledger: Ledger) -> str:
    counts = ledger.counts()
    return f"{ledger.tasks} planned = {counts['written']} written + {counts['skipped']} skipped + {counts['quarantined']} quarantined"


@contextmanager
def _interruptible(progress: RunProgress) -> Iterator[threading.Event]:
    """The first Ctrl-C (or SIGTERM) drains, the second ends at once; the target can be resumed after either."""
    stop = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        progress.say(
            "stopping", signal=signal.Signals(number).name, now="slabs in flight are finished; once more to end at once"
        )

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


if __name__ == "__main__":
    sys.exit(main())
