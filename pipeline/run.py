"""The main job: `python -m pipeline.run volume.yaml [--dry-run]`."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

from distributed import Client

from emsr import start
from pipeline import __version__
from pipeline.base.command import INTERRUPTED, guarded, stopping
from pipeline.base.errors import EmsrError, SourceError
from pipeline.cluster.connect import batch_job, connect, slabs_in_flight, tune, worker_count
from pipeline.config import urls, volume
from pipeline.config.volume import Config
from pipeline.inference.defaults import undecided
from pipeline.plan.rates import MeasuredDevice
from pipeline.plan.receipt import QUARANTINED, WRITTEN
from pipeline.prepare import chosen
from pipeline.prepare.dry_run import print_price
from pipeline.prepare.holes import Holes, look
from pipeline.prepare.mask_reach import Reach, nothing_touched, reach
from pipeline.prepare.measured import facts, measured_device
from pipeline.prepare.place import check_place, claim, damaged_objects, sweep
from pipeline.prepare.prepare import prepare, settled
from pipeline.prepare.prepared import Prepared
from pipeline.schedule import report
from pipeline.schedule.ask import ask_workers
from pipeline.schedule.check_workers import check_workers
from pipeline.schedule.crew import Crew
from pipeline.schedule.exam import Exam
from pipeline.schedule.execute import execute
from pipeline.schedule.leases import lease_seconds, tasks_in
from pipeline.schedule.progress import RunProgress, SurveyProgress
from pipeline.schedule.run_state import RunState
from pipeline.schedule.sample import look_for
from pipeline.schedule.totals import RunTotals
from pipeline.sections import bad_sections
from pipeline.sections.survey import Survey, delete_measurements, detect
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import MAX_TOLD, TargetLock
from pipeline.storage.volume import Source
from pipeline.worker.check import device_facts, refuse_other_precision
from pipeline.worker.lease import check_worker, process_lease

SHOWN_HOSTS = 3
TELL_S = 1.0
"""How often the lock is told what workers did."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=start.program("run"),
        description="Super-resolve the volume that volume.yaml names. Run again to resume.",
    )
    parser.add_argument("volume", help="path of volume.yaml")
    parser.add_argument("--dry-run", action="store_true", help="print the price and touch nothing")
    args = parser.parse_args(argv)
    return guarded(lambda: run(volume.load(args.volume), dry_run=args.dry_run), prints=args.dry_run)


def run(config: Config, dry_run: bool = False) -> int:
    """Run or resume the volume of `config`; with `dry_run`, print its price and write nothing. Returns the exit code.

    It is 0 when all tasks are written or skipped, or after a dry run; 1 when some are quarantined; 130 when the run was
    interrupted with tasks left. Raises UserError.
    """
    prepared = prepare(config, lambda survey, source: _detect(config, survey, source, keep=not dry_run))
    for note in prepared.source.notes:
        print(f"emsr: {note}", file=sys.stderr)
    resumed = check_place(prepared)
    if dry_run:
        device = measured_device(config.cluster, prepared.job.network)
        found = facts(device, prepared.job.network) if device else device_facts()
        return _dry_run(prepared if resumed else settled(prepared, [found]), device)
    run_id = time.strftime("%Y%m%dT%H%M%S", time.gmtime()) + "-" + uuid.uuid4().hex[:6]
    prepared = replace(prepared, job=replace(prepared.job, run=run_id))
    job = prepared.job
    lock = TargetLock(prepared.store, run_id)
    lock.refuse_others()
    ledger = Ledger(prepared.store, job.digest, job.plan.tasks, run_id, lock.hold)
    if resumed:
        ledger.load()
        ledger.requeue(QUARANTINED)
        if not ledger.counts()["pending"] and not damaged_objects(prepared):
            print(f"{job.target.url} is complete: {_sum(ledger)}")
            if not ledger.count(WRITTEN, range(job.plan.slabs)):
                raise _nothing_written(prepared, job.plan.slabs)
            return 0
    mask = reach(prepared)
    _say_holes(None if resumed else look(prepared), mask)
    if config.cluster.kind == "local":  # its workers have this machine's device
        refuse_other_precision(job.network)
    with connect(config.cluster, slabs_in_flight(config)) as client:
        if not resumed and undecided(prepared.config.network):
            prepared = settled(prepared, ask_workers(client, device_facts, "what device they have"))
            ledger = Ledger(prepared.store, prepared.job.digest, ledger.tasks, run_id, lock.hold)
        for line in chosen.in_vain(prepared.job):
            print(f"emsr: {line}", file=sys.stderr)
        return _run_on(client, prepared, ledger, lock, mask)


def _say_holes(found: Holes | None, mask: Reach | None) -> None:
    if found is not None and found.absent:
        print(f"emsr: source: {found}", file=sys.stderr)
    if mask is not None and mask.holes:
        print(f"emsr: source.mask: {mask.of_holes}", file=sys.stderr)


def _run_on(client: Client, prepared: Prepared, ledger: Ledger, lock: TargetLock, mask: Reach | None) -> int:
    """Ask the cluster's workers whether they are fit, take the target, and write what `ledger` does not have."""
    cluster = prepared.config.cluster
    exam = Exam(prepared.job, check_worker, cluster.mixed, resumed=bool(ledger.counts()["written"]))
    with _crew(client, exam) as crew:
        check_workers(client, crew)  # first: a mistake there leaves no trace
        if cluster.tunes():
            tune(client)
        elif crew.may_freeze:
            _warn_of_profiler(crew.may_freeze)
        lock.acquire()
        try:
            check_place(prepared)  # again, and the ledger: another run may have begun or ended in between
            claim(prepared)
            sweep(prepared)
            exam.record()
            ledger.load()
            return _execute(prepared, RunState(exam.job, ledger, lock), client, crew, mask)
        finally:
            with suppress(EmsrError):  # a disk that is gone is why the run ends
                sweep(prepared)  # what killed workers have left
            lock.release()


@contextmanager
def _crew(client: Client, exam: Exam) -> Iterator[Crew]:
    crew = Crew(client, exam, lambda who, why: print(f"emsr: set aside: {who}: {why}", file=sys.stderr))
    try:
        exam.begin()
        yield crew
    finally:
        try:
            crew.close()
        finally:
            exam.end()


def _warn_of_profiler(hosts: set[str]) -> None:
    more = f" and {len(hosts) - SHOWN_HOSTS} more" if len(hosts) > SHOWN_HOSTS else ""
    named = ", ".join(sorted(hosts)[:SHOWN_HOSTS]) + more
    print(
        f"emsr: workers on {named} run Dask's profiler under a Python before 3.12, where it can stop a worker for good "
        "(cpython issue 106883). Wanted: distributed.worker.profile.enabled: false there, Python 3.12, or "
        "cluster.tune: true. docs/clusters.md says more.",
        file=sys.stderr,
    )


def _dry_run(prepared: Prepared, device: MeasuredDevice | None) -> int:
    config = prepared.config
    job = batch_job(config.cluster, slabs_in_flight(config))
    for line in bad_sections.describe(prepared.spec["source"]["bad_sections"]):
        print(line)
    for line in chosen.describe(prepared):
        print(line)
    workers = worker_count(config.cluster)
    lease_s = lease_seconds(workers * slabs_in_flight(config))
    print_price(prepared, device, workers, lambda slab_s: tasks_in(lease_s, slab_s))
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


def _execute(prepared: Prepared, run: RunState, client: Client, crew: Crew, mask: Reach | None) -> int:
    plan, ledger, lock = run.job.plan, run.ledger, run.lock
    exam = crew.exam
    assert lock is not None
    assert exam is not None
    again = ledger.requeue(QUARANTINED)
    before = ledger.counts()
    done = before["written"] + before["skipped"]
    with RunProgress(ledger.tasks, done) as progress, stopping(lambda by: _drain(run, progress, by)):
        network, lattice = run.job.network, plan.lattice
        chosen = {"cell": lattice.cell, "halo": lattice.halo, "precision": network.precision, "batch": network.batch}
        progress.say("network", name=network.name, **chosen)
        progress.say("plan", slabs=plan.slabs, pyramid_blocks=plan.tasks - plan.slabs, done=done, retried=again)
        if prepared.later:
            progress.say("stated_later", **prepared.later)
        if mask is not None:
            progress.say("mask", touched=mask.touched, looked=mask.looked, slabs=mask.slabs, holes=mask.holes)
        progress.say("cluster", workers=crew.capacity().workers, scheduler=client.scheduler.address)
        if other := exam.other_sources:
            progress.say("other_emsr", wrote_so_far=other, is_now=f"{__version__} ({exam.job.sources[:12]})")
        crew.aside.tell = lambda who, why: progress.say("set_aside", worker=who, why=why)

        try:
            execute(client, run, process_lease, callback(progress, lock), crew)
        finally:
            _tell(lock, run.totals)
        lost = look_for(run)
        sheet = report.write(prepared, run, exam.crew, lost)
        if bad := prepared.spec["source"]["bad_sections"]:
            shown = {z: one["why"] for z, one in list(bad.items())[: bad_sections.MAX_SHOWN]}
            progress.say("bad_sections", count=len(bad), **shown)
        progress.say("ledger", planned=ledger.tasks, **ledger.counts())
        progress.say("report", report=f"{prepared.store.url}/report.json", contact_sheet=sheet)
    return _verdict(prepared, run, lost)


def callback(progress: RunProgress, lock: TargetLock) -> Callable[[RunTotals], None]:
    """What is called after every answer: it shows how far the run is, and now and then tells the lock."""
    told = float("-inf")

    def show(totals: RunTotals) -> None:
        nonlocal told
        progress.update(totals)
        totals.dropped_lines = progress.dropped
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            _tell(lock, totals)

    return show


def _tell(lock: TargetLock, totals: RunTotals) -> None:
    """Give the lock what `status` shows of the run: the workers heard of last, and those that were set aside last."""
    last = list(itertools.islice(reversed(totals.workers.items()), MAX_TOLD))
    aside = list(itertools.islice(reversed(totals.aside.items()), MAX_TOLD))
    lock.workers = {name: asdict(did) for name, did in reversed(last)}
    lock.aside = dict(reversed(aside))
    lock.in_all = {"workers": len(totals.workers), "set_aside": len(totals.aside)}


def _verdict(prepared: Prepared, run: RunState, lost: Sequence[str]) -> int:
    ledger, counts = run.ledger, run.ledger.counts()
    if lost:
        print(
            f"emsr: {len(lost)} of the tasks looked for are not as they were written: {lost[0]}. "
            "Run emsr verify --requeue, then the same command again.",
            file=sys.stderr,
        )
        return 1
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
    if not ledger.count(WRITTEN, range(run.job.plan.slabs)):
        raise _nothing_written(prepared, run.job.plan.slabs)
    print(f"done: {_sum(ledger)}")
    return 0


def _nothing_written(prepared: Prepared, slabs: int) -> SourceError:
    """The error of a run all of whose slabs were skipped."""
    mask = prepared.config.source.mask
    if mask is not None and not prepared.config.source.skip_empty:
        return nothing_touched(slabs, mask.url)
    return SourceError(
        f"0 of {slabs} slabs written: every one is constant (source.skip_empty)"
        + (", or outside the mask" if mask is not None else ""),
        "a source with something in it",
        "Look at it: perhaps this is not the level, box or window that you mean",
    )


def _sum(ledger: Ledger) -> str:
    counts = ledger.counts()
    ended = " + ".join(f"{counts[state]} {state}" for state in ("written", "skipped", "quarantined"))
    return f"{ledger.tasks} planned = {ended}"


def _drain(run: RunState, progress: RunProgress, signal: str) -> None:
    """What a signal does: nothing more is begun. The target can be resumed, after a second one too."""
    run.stop.set()
    progress.say("stopping", signal=signal, now="slabs in flight are finished; once more to end at once")


if __name__ == "__main__":
    sys.exit(main())
