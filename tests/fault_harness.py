"""The harness does faults to real processes, files and servers of the main job and checks what must hold after each.

`python tests/fault_harness.py --seed 7 --faults 200 [--source VOLUME] [--only NAME ...] [--time-out 600] [--done FILE]`
does as many as asked, of every kind in turn, on a small made volume or on the middle of VOLUME. It prints a JSON line
for each and a table of the kinds. With --done the lines are kept in FILE, and what it has is not done again: the same
command goes on. The exit code is 1 when one of these failed:

    lost           an object is missing, or a task that the ledger held was begun again
    different      the target does not equal, file by file, that of an undisturbed run
    not closed     the ledger does not say written or skipped of every task
    two writers    a run began tasks after another had taken the target over
    unseen         verify did not tell of damage
    hang           a command took longer than the time-out, or left a process behind
    promise        what was computed twice had ended more than PROMISE_S before the fault
    wrong answer   another exit code or other words than documented, or a traceback
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fault_scene import Broken, Scene, undisturbed
from faults import FAULTS, do, lacks

LAWS = ("lost", "different", "not closed", "two writers", "unseen", "hang", "promise", "wrong answer")


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults done to the main job, and what must hold after each.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=len(FAULTS))
    parser.add_argument(
        "--source", type=Path, help="a local volume; its middle is super-resolved (a made one without this)"
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, help="these faults alone")
    parser.add_argument("--time-out", type=float, default=600.0, help="seconds after which a command hangs")
    parser.add_argument("--done", type=Path, help="a file that keeps what was done")
    args = parser.parse_args()
    names = []
    for name in args.only or FAULTS:
        if reason := lacks(name):
            print(f"left out: {name} ({reason})", file=sys.stderr)
        else:
            names.append(name)
    if not names:
        return 0
    kept = args.done.read_text().splitlines() if args.done and args.done.exists() else []
    results: list[dict[str, Any]] = [one for one in map(json.loads, kept) if one["seed"] == args.seed]
    done = {(one["fault"], one["name"]) for one in results}
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "undisturbed"
        base.mkdir()
        source, keys = undisturbed(base, args.source.resolve() if args.source else None)
        for number in range(args.faults):
            name = names[number % len(names)]
            if (number, name) in done:
                continue
            rng = random.Random(f"{args.seed} {number} {name}")
            folder = Path(place) / f"{number}"
            folder.mkdir()
            result = {"seed": args.seed, "fault": number, "name": name} | _done(
                name, Scene(folder, source, keys, base, rng, args.time_out, holds_promise=True)
            )
            results.append(result)
            print(json.dumps(result), flush=True)
            if args.done:
                with args.done.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            shutil.rmtree(folder)
    failed = sum(bool(one["law"]) for one in results)
    print(_table(results))
    print(f"seed {args.seed}: {len(results)} faults of {len(names)} kinds, {failed} failed")
    return 1 if failed else 0


def _done(name: str, scene: Scene) -> dict[str, Any]:
    """The fault is done; the result says how long that took and which law did not hold."""
    began, law, what = time.monotonic(), "", ""
    try:
        do(name, scene)
    except Broken as broken:
        law, what = broken.law, str(broken)
    except Exception as error:  # of the harness itself: the next fault is done all the same
        law, what = "wrong answer", f"{type(error).__name__}: {error}"
    return {"seconds": round(time.monotonic() - began, 1), "law": law, "failed": what}


def _table(results: list[dict[str, Any]]) -> str:
    """A line for each kind: how many were done, and how often each law did not hold."""
    kinds: dict[str, collections.Counter[str]] = {}
    for one in results:
        kinds.setdefault(one["name"], collections.Counter()).update(["done", one["law"] or "held"])
    wide = max(map(len, kinds), default=0)
    lines = [f"{'':<{wide}}  done  held  " + "  ".join(LAWS)]
    lines += [
        f"{name:<{wide}}  {counts['done']:>4}  {counts['held']:>4}  "
        + "  ".join(f"{counts[law] or '':>{len(law)}}" for law in LAWS)
        for name, counts in kinds.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
