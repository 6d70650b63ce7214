"""Measures what it costs that files are synchronised to the disk: wall time of a run with and without, turn about.

    python benchmarks/durable_writes.py [slabs=8] [side=64] [rounds=3]

One worker with two slabs in flight, as by default, through the real schedule and ledger. nearest copies voxels, so that
writing has the greatest share that a run can have; bicubic is the cheapest network that computes. "Without" puts a
function that does nothing in the place of fsync, in worker and client.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from parts.tissue_job import drive_all, ready, write_source

from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig

DEPTH = 8
_FSYNC = os.fsync


def targets(side: int) -> dict[str, dict[str, Any]]:
    """What a slab of `side` x `side` LR voxels is written to: one shard, and a file for each chunk."""
    return {
        "ome-zarr": {"chunk_shape": [DEPTH, 128, 128], "shard_shape": [DEPTH, 8 * side, 8 * side]},
        "precomputed": {"format": "precomputed", "encoding": "raw", "chunk_shape": [DEPTH, 128, 128]},
    }


def turn(on: bool) -> None:
    """From now on this process's files are synchronised, or not."""
    os.fsync = _FSYNC if on else lambda file: None


def measure(slabs: int, side: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_source(folder / "lr", (slabs * DEPTH, side, side), (DEPTH, side, side))
        for network in ("nearest", "bicubic"):
            for label, target in targets(side).items():
                found: dict[bool, list[float]] = {True: [], False: []}
                with connect(ClusterConfig(workers=1), 2) as client:
                    for number in range(-1, rounds):  # the first round warms up
                        for on in (True, False):
                            turn(on)
                            client.run(turn, on)
                            title, settings = f"{network}-{label}-{number}-{on}", {"name": network, "cell": side}
                            shape = (DEPTH, side, side)
                            job = ready(folder, source, title, shape, settings, 2, fidelity=False, **target)
                            wall_s = drive_all(client, job).wall_s
                            if number >= 0:
                                found[on].append(wall_s)
                    turn(True)
                with_s, without_s = (statistics.median(found[on]) for on in (True, False))
                row = {
                    "network": network,
                    "target": label,
                    "with_s": round(with_s, 2),
                    "without_s": round(without_s, 2),
                }
                print(row | {"ratio": round(with_s / without_s, 2)}, flush=True)


if __name__ == "__main__":
    measure(*([int(a) for a in sys.argv[1:]] + [8, 64, 3][len(sys.argv) - 1 :]))
