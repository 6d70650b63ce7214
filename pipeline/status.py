"""`python -m pipeline.status volume.yaml`: what the ledger says, from any machine that sees the target. Reads only."""

from __future__ import annotations

import argparse
import json
import sys
import time

from emsr import start
from pipeline.base.command import guarded
from pipeline.base.errors import LedgerError
from pipeline.base.words import counted
from pipeline.config import urls
from pipeline.config import volume as configuration
from pipeline.config.volume import Config
from pipeline.plan.receipt import QUARANTINED
from pipeline.prepare import recorded
from pipeline.storage.kv import Store
from pipeline.storage.target_lock import holder, last_aside, last_workers, left_out

SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=start.program("status"),
        description="Show how far the target of volume.yaml is. Needs neither source nor cluster.",
    )
    parser.add_argument("volume", help="path of volume.yaml")
    args = parser.parse_args(argv)
    return guarded(lambda: status(configuration.load(args.volume)), prints=True)


def status(config: Config) -> int:
    """Exit code 0 when every task is written or skipped, 1 while some are not."""
    found = recorded.read(config.target.url, "status")
    if found is None:
        print(f"nothing was run for {config.target.url} yet (no {urls.sidecar(config.target.url)}/plan.json)")
        return 1
    ledger, plan, slabs, tasks = found.ledger, found.plan, found.slabs, found.ledger.tasks
    counts = ledger.counts()
    print(f"target       {config.target.url}")
    print(
        f"plan         {found.digest[:16]}, {counted(slabs, 'slab')}"
        + (f" and {counted(tasks - slabs, 'pyramid block')}" if tasks > slabs else "")
    )
    print(
        f"ledger       {tasks:,} planned = "
        + " + ".join(f"{counts[k]:,} {k}" for k in ("written", "skipped", "quarantined", "pending"))
    )
    print(f"put          {counted(ledger.bytes_written, 'byte')} (objects written twice count twice)")
    for line in found.bad_sections:
        print(line)
    if requests := _requests(found.store.get("report.json")):
        print(f"requests     {requests}")
    _say_holder(found.store)
    if (times := ledger.times).tasks:
        print(
            f"timings      {times.total / times.tasks:.2f} s a task on the last {times.tasks:,}, "
            f"the slowest {times.slowest:.2f} s (task {times.slowest_task})"
        )
    more = left_out(found.store)
    _say_workers(last_workers(found.store), more.get("workers", 0))
    for name, aside in last_aside(found.store).items():
        print(f"set aside    {name}: {aside}")
    if more.get("set_aside"):
        print(f"set aside    and {more['set_aside']:,} more; report.json names them when the run has ended")
    for key in ledger.damaged:
        print(f"damaged      {key}: its records are lost; what they alone told of runs again")
    for _, index in zip(range(SHOWN), ledger.indices(QUARANTINED), strict=False):
        why = ledger.why(index)
        print(
            f"quarantined  task {index}, {plan.describe(index)}: {why.first_line}"
            + (f" [{why.worker}]" if why.worker else "")
        )
    if counts["quarantined"] > SHOWN:
        print(f"quarantined  and {counts['quarantined'] - SHOWN:,} more")
    return 0 if counts["written"] + counts["skipped"] == tasks else 1


def _say_holder(store: Store) -> None:
    try:
        lock = holder(store)
    except LedgerError as error:
        print(f"lock         {error}")
        return
    if lock is not None:
        age = time.time() - float(lock["renewed"])
        print(f"running      run {lock['run']}, process {lock['pid']} on {lock['host']}, seen {age:.0f} s ago")


def _requests(report: bytes | None) -> str:
    """What the last run that ended says of its stores; empty where there is nothing to say."""
    try:
        found = json.loads(report or b"{}").get("requests", {})
        refused, retried = int(found.get("refused", 0)), int(found.get("retried", 0))
    except (ValueError, TypeError, AttributeError):
        return ""
    return (
        f"{refused:,} were answered 429 or 503, {retried:,} were tried again, in the last run that ended"
        if refused or retried
        else ""
    )


def _say_workers(workers: dict[str, dict[str, float]], more: int) -> None:
    """The workers of this run or the last one, those heard of last first, and how many `more` there are."""
    for name, did in sorted(workers.items(), key=lambda item: -item[1]["last"])[:SHOWN]:
        quarantined = f", {did['quarantined']:.0f} of them quarantined" if did["quarantined"] else ""
        print(
            f"worker       {name}: {counted(round(did['tasks']), 'task')}{quarantined}, "
            f"{did['seconds'] / max(1.0, did['tasks']):.2f} s each, "
            f"the last {time.time() - did['last']:.0f} s ago"
        )
    if (others := len(workers) - SHOWN + more) > 0:
        print(f"worker       and {others:,} more")


if __name__ == "__main__":
    sys.exit(main())
