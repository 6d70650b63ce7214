"""`python -m pipeline.status volume.yaml`: what the ledger says, from any machine that sees the target. Reads only."""

from __future__ import annotations

import argparse
import json
import sys
import time

from pipeline import bad_sections
from pipeline import config as configuration
from pipeline.command import guarded
from pipeline.config import Config
from pipeline.errors import LedgerError
from pipeline.prepare import sidecar
from pipeline.storage.kv import Store
from pipeline.storage.ledger import QUARANTINED, Ledger
from pipeline.storage.target_lease import holder

SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.status", description="Show how far the target of volume.yaml is. Needs neither source nor cluster."
    )
    parser.add_argument("volume", help="path of volume.yaml")
    args = parser.parse_args(argv)
    return guarded(lambda: status(configuration.load(args.volume)))


def status(config: Config) -> int:
    """Exit code 0 when every task is written or skipped, 1 while some are not."""
    store = Store(sidecar(config.target.url))
    stored = store.get("plan.json")
    if stored is None:
        print(f"nothing was run for {config.target.url} yet (no {store.url}/plan.json)")
        return 1
    try:
        body = json.loads(stored)
        digest, tasks, slabs = str(body["digest"]), int(body["tasks"]), int(body["slabs"])
        bad = bad_sections.told(body["spec"]["source"]["bad_sections"])
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"{store.url}/plan.json is damaged", "the plan of an earlier run", "Restore it, or choose another target.url") from None
    ledger = Ledger(store, digest, tasks, run_id="status")
    ledger.load()
    counts = ledger.counts()
    print(f"target       {config.target.url}")
    print(f"plan         {digest[:16]}, {slabs:,} slabs" + (f" and {tasks - slabs:,} pyramid blocks" if tasks > slabs else ""))
    print(f"ledger       {tasks:,} planned = " + " + ".join(f"{counts[k]:,} {k}" for k in ("written", "skipped", "quarantined", "pending")))
    print(f"put          {ledger.bytes_written:,} bytes (objects written twice count twice)")
    for line in bad:
        print(line)
    if asked := _requests(store.get("report.json")):
        print(f"requests     {asked}")
    if running := holder(store):
        print(
            f"running      run {running['run']}, process {running['pid']} on {running['host']}, seen {time.time() - float(str(running['renewed'])):.0f} s ago"
        )
    for key in ledger.damaged:
        print(f"damaged      {key}: its records are lost, those tasks run again")
    for _, index in zip(range(SHOWN), ledger.indices(QUARANTINED), strict=False):
        print(f"quarantined  task {index}: {(ledger.why(index).splitlines() or ['no reason kept'])[0]}")
    if counts["quarantined"] > SHOWN:
        print(f"quarantined  and {counts['quarantined'] - SHOWN:,} more")
    return 0 if counts["written"] + counts["skipped"] == tasks else 1


def _requests(report: bytes | None) -> str:
    """What the last run that ended says of its stores; empty where there is nothing to say."""
    try:
        found = json.loads(report or b"{}").get("requests", {})
        refused, retried = int(found.get("refused", 0)), int(found.get("retried", 0))
    except (ValueError, TypeError, AttributeError):
        return ""
    return f"{refused:,} were answered 429 or 503, {retried:,} were tried again, in the last run that ended" if refused or retried else ""


if __name__ == "__main__":
    sys.exit(main())
