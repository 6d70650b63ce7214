"""`python -m pipeline.verify volume.yaml`: stored objects read again and held against the receipts' checksums."""

from __future__ import annotations

import argparse
import random
import sys
import time

from rich.console import Console
from rich.progress import track

from pipeline.base.command import guarded
from pipeline.config import volume as configuration
from pipeline.config.volume import Config
from pipeline.plan.receipt import PENDING, STATES, WRITTEN, Receipt
from pipeline.prepare.place import check_begun
from pipeline.prepare.prepare import prepare
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import TargetLock
from pipeline.storage.targets.open import open_target
from pipeline.storage.targets.task_objects import checksum, object_keys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.verify",
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
    """Exit code 0 when everything checked is as written and the ledger is closed, 1 otherwise. Raises UserError."""
    prepared = prepare(config)
    job, store = prepared.job, prepared.store
    check_begun(prepared)
    ledger = Ledger(store, job.digest, job.plan.tasks, run_id=time.strftime("%Y%m%dT%H%M%S-verify", time.gmtime()))
    ledger.load()
    written = {i: record for i, record in ledger.records().items() if record[0] == WRITTEN}
    chosen = (
        sorted(written) if sample is None else sorted(random.sample(sorted(written), min(max(0, sample), len(written))))
    )
    target = open_target(job.target)
    damaged = []
    for index in track(chosen, "verify", console=Console(file=sys.stderr), disable=not sys.stderr.isatty()):
        objects = target.get(object_keys(target, job.plan, index))
        lost = [key for key, value in objects.items() if value is None]
        whole = {key: value for key, value in objects.items() if value is not None}
        if lost or checksum(whole) != written[index][1]:
            damaged.append(index)
            print(
                f"damaged      task {index}: "
                + (f"{lost[0]} is missing" if lost else "stored bytes differ from those written")
                + f" ({len(objects)} objects)"
            )
    counts = ledger.counts()
    print(
        f"verified     {len(chosen):,} of {len(written):,} written tasks, {len(damaged)} damaged; ledger: "
        + ", ".join(f"{counts[k]:,} {k}" for k in STATES)
    )
    if damaged and requeue:
        _requeue(store, ledger, damaged)
        print(f"requeued     {len(damaged)} tasks; run python -m pipeline.run to write them again")
    elif damaged:
        print("Run again with --requeue, then python -m pipeline.run, to write them again")
    return 1 if damaged or counts["pending"] or counts["quarantined"] else 0


def _requeue(store: Store, ledger: Ledger, damaged: list[int]) -> None:
    lock = TargetLock(store, f"verify-{time.time():.0f}")
    lock.acquire()
    try:
        ledger.record(Receipt(i, PENDING) for i in damaged)
        ledger.flush()
    finally:
        lock.release()


if __name__ == "__main__":
    sys.exit(main())
