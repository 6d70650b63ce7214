"""The harness does faults to real processes, files and servers of the main job and checks what must hold after each.

`python tests/fault_harness.py --seed 7 --faults 200 [--source VOLUME] [--only NAME ...] [--time-out 600]`
does as many as asked, chosen by the seed, on a small made volume or on the middle of VOLUME, and prints a JSON line for
each. The exit code is 1 when one of these failed:

    same bytes     the target equals, file by file, that of an undisturbed run
    closed         the ledger says written or skipped of every task
    kept           no task that the ledger held before a crash was begun again
    promise        what was computed twice had ended at most PROMISE_S before the fault
    no hang        no command took longer than the time-out, and none left a process behind
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from fault_scene import Scene, undisturbed
from faults import FAULTS, do, lacks


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults done to the main job, and what must hold after each.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=len(FAULTS))
    parser.add_argument(
        "--source", type=Path, help="a local volume; its middle is super-resolved (a made one without this)"
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="these faults alone")
    parser.add_argument("--time-out", type=float, default=300.0, help="seconds after which a command hangs")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    names = [name for name in args.only or FAULTS if not lacks(name)]
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "undisturbed"
        base.mkdir()
        source, keys = undisturbed(base, args.source.resolve() if args.source else None)
        for number in range(args.faults):
            name = names[number % len(names)]
            folder = Path(place) / f"{number}"
            folder.mkdir()
            began, wrong = time.monotonic(), ""
            try:
                do(
                    name,
                    Scene(folder, source, keys, base, random.Random(rng.random()), args.time_out, holds_promise=True),
                )
            except AssertionError as error:
                failed, wrong = failed + 1, str(error)
            print(
                json.dumps(
                    {"fault": number, "name": name, "seconds": round(time.monotonic() - began, 1), "failed": wrong}
                ),
                flush=True,
            )
            shutil.rmtree(folder)
    print(f"seed {args.seed}: {args.faults} faults, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
