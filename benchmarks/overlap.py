"""Measures how reads, network and writes of one worker overlap, with networks that sleep and all else real.

    python benchmarks/overlap.py [slabs=32] [side=128]
    python benchmarks/overlap.py device [slabs=16] [side=512] [centre_ms=5]

The first runs one slab at a time (sequential) and two, in turn, for I/O of 30 % and 60 % of the network's time, which
is spent while the device is held, as on a CPU. Printed is wall time over network time; 1.00 is the limit. The time of
I/O is measured first, without a network.

The second gives slabs to a device with a queue, as a GPU has one (parts/sleeping_device.py), which takes `centre_ms`
for each section of 64 x 64 LR voxels at x8, with one, two and three slabs in flight and a target of all defaults.
Printed are the share of time in which the device was busy from the first slab's begin to the last one's end, its share
of the whole run's time, ends included, and how many cores the worker used meanwhile.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
from distributed import Client
from parts import sleeping
from parts.tissue_job import Driven, drive_all, ready, write_source

from pipeline.cluster.connect import connect, stop_profiling
from pipeline.config.volume import ClusterConfig

CELL = 64
SHARES = (0.3, 0.6)


class Overlap:
    """Drives jobs over volumes of made tissue, each on a fresh worker that has warmed up on two slabs."""

    def __init__(self, folder: Path, slabs: int, side: int) -> None:
        depth = sleeping.DEPTH
        self.folder, self.shape = folder, (depth, side, side)
        self._volume = write_source(folder / "lr", (slabs * depth, side, side), (depth, 64, 64))
        self._few = write_source(folder / "few", (2 * depth, side, side), (depth, 64, 64))

    def drive(self, label: str, in_flight: int, cell: int, **target: Any) -> tuple[Driven, float]:
        """The job's totals and time, and the CPU seconds that the worker spent on it."""
        network = {"name": "nearest", "cell": cell}
        preload = {"distributed.worker.preload": ["parts.sleeping", "parts.sleeping_device"]}
        with dask.config.set(preload), connect(ClusterConfig(workers=1), in_flight) as client:
            stop_profiling(client)
            jobs = (
                ready(self.folder, volume, f"{label}{part}", self.shape, network, in_flight, **target)
                for part, volume in (("-warm", self._few), ("", self._volume))
            )
            drive_all(client, next(jobs))
            before = cpu_s(client)
            driven = drive_all(client, next(jobs))
            used_s = cpu_s(client) - before
        shutil.rmtree(self.folder / label)  # it is large
        return driven, used_s


def cpu_s(client: Client) -> float:
    return sum(client.run(time.process_time).values())


def measure(slabs: int = 32, side: int = 128) -> None:
    with tempfile.TemporaryDirectory() as name:
        overlap = Overlap(Path(name), slabs, side)

        def drive(label: str, sleep_s: float, in_flight: int) -> Driven:
            os.environ["SLEEPING_S"] = str(sleep_s)
            return overlap.drive(label, in_flight, side, fidelity=False, mips=1)[0]

        alone = drive("alone", 0.0, 1).totals
        io_s = (alone.seconds["read"] + alone.seconds["write"]) / alone.written
        for share, in_flight in itertools.product(SHARES, (1, 2)):
            driven = drive(f"{share}-{in_flight}", io_s / share, in_flight)
            network_s = driven.totals.seconds["network"]
            say(
                io_over_network=share,
                in_flight=in_flight,
                network_s_per_slab=network_s / slabs,
                wall_over_network=driven.wall_s / network_s,
            )


def measure_device(slabs: int = 16, side: int = 512, centre_ms: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        overlap = Overlap(Path(name), slabs, side)
        os.environ["SLEEPING_CENTRE_MS"] = str(centre_ms)
        for in_flight in (1, 2, 3):
            log = Path(name, f"log-{in_flight}")
            os.environ["SLEEPING_LOG"] = str(log)
            driven, worker_s = overlap.drive(str(in_flight), in_flight, CELL)
            spans = [tuple(map(float, line.split())) for line in log.read_text().splitlines()][-slabs:]
            busy_s = sum(end - start for start, end in spans)
            seconds = driven.totals.seconds
            say(
                in_flight=in_flight,
                sr_mb_per_busy_s=driven.totals.voxels / busy_s / 1e6,
                busy=busy_s / (spans[-1][1] - spans[0][0]),
                busy_ends_included=busy_s / driven.wall_s,
                network_over_busy=seconds["network"] / busy_s,
                read_s_per_slab=seconds["read"] / slabs,
                write_s_per_slab=seconds["write"] / slabs,
                cores=worker_s / driven.wall_s,
            )


def say(**found: float) -> None:
    print({key: round(value, 3) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["device"]:
        measure_device(*map(int, sys.argv[2:]))
    else:
        measure(*map(int, sys.argv[1:]))
