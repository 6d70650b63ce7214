"""Measures how reads, network and writes overlap: wall time over network time, for I/O of 30 % and 60 % of the latter.

    python benchmarks/overlap.py [slabs=32] [side=128]

One worker runs with one slab in flight (sequential) and with two, in turn. The network sleeps while it holds the
device. Reading, encoding and writing are real; their time is measured first, without a network. 1.00 is the limit.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from parts import sleeping
from parts.tissue_job import Driven, drive_all, ready, write_source

from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig


def measure(slabs: int, side: int) -> list[dict[str, float]]:
    depth = sleeping.DEPTH
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_source(folder / "lr", (slabs * depth, side, side), (depth, 64, 64))
        few = write_source(folder / "few", (2 * depth, side, side), (depth, 64, 64))

        def drive(label: str, volume: Path, in_flight: int) -> Driven:
            os.environ["SLEEPING_S"] = str(sleep_s)
            with connect(ClusterConfig(workers=1), in_flight) as client:
                shape = (depth, side, side)
                network = {"name": "nearest", "cell": side}
                drive_all(
                    client, ready(folder, few, f"{label}-warm", shape, network, in_flight, fidelity=False, mips=1)
                )
                return drive_all(
                    client, ready(folder, volume, label, shape, network, in_flight, fidelity=False, mips=1)
                )

        sleep_s = 0.0
        alone = drive("alone", source, 1).totals
        io_s = (alone.seconds["read"] + alone.seconds["write"]) / alone.written
        for share in (0.3, 0.6):
            sleep_s = io_s / share
            for in_flight in (1, 2):
                driven = drive(f"{share}-{in_flight}", source, in_flight)
                seconds = driven.totals.seconds
                row = {
                    "io_over_network": share,
                    "in_flight": in_flight,
                    "network_s_per_slab": seconds["network"] / slabs,
                    "wall_over_network": driven.wall_s / seconds["network"],
                }
                found.append(row)
                print({key: round(value, 3) for key, value in row.items()}, flush=True)
    return found


if __name__ == "__main__":
    measure(*([int(a) for a in sys.argv[1:]] + [32, 128][len(sys.argv) - 1 :]))
