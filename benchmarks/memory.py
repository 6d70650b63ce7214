"""Measures a worker's peak memory against the plan's promise, for several slab sizes, encodings and slabs in flight.

    python benchmarks/memory.py [few|all] [slabs=6]

Each case has a fresh worker. `few` takes about two minutes, `all` about twenty. Printed for every case are the worker's
size before its first slab, its peak (VmHWM), the promise (pipeline.plan.price.memory_bytes, with the compression that
the run reached), and peak over promise: 1.00 is wanted, a test holds 0.85 to 1.15.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.tissue_job import drive_all, ready, write_source

import models
from models import weights
from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig
from pipeline.plan.price import memory_bytes, stored_share

MIB = 1 << 20
DEPTH = 8
TARGETS: dict[str, dict[str, Any]] = {
    "blosc-zstd": {"format": "ome-zarr", "encoding": "blosc-zstd"},
    "raw": {"format": "ome-zarr", "encoding": "raw"},
    "precomputed": {"format": "precomputed", "encoding": "raw"},
    "jpeg": {"format": "precomputed", "encoding": "jpeg"},
    "jxl": {"format": "precomputed", "encoding": "jxl"},
}
SIDES = {2: (128, 128), 32: (256, 256), 64: (256, 512), 128: (512, 512)}
"""LR rows and columns of a slab of so many MiB of SR voxels, at its case's depth."""


@dataclass(frozen=True)
class Case:
    target: str
    slab_mib: int
    in_flight: int
    network: str = "bicubic"
    depth: int = DEPTH


GPEMSR = Case("blosc-zstd", 2, 2, "gpemsr", depth=2)
"""Preset small, x8. The weights are random, for memory does not depend on them."""
FEW = [
    Case("blosc-zstd", 32, 1),
    Case("blosc-zstd", 128, 2),
    Case("jpeg", 64, 2),
    Case("jxl", 64, 2),
    Case("precomputed", 64, 3),
    GPEMSR,
]
ALL = [*(Case(*each) for each in itertools.product(TARGETS, (32, 64, 128), (1, 2, 3))), GPEMSR]


def random_weights(folder: Path) -> dict[str, Any]:
    """Writes random weights; returns keys for volume.yaml's `network`."""
    network = models.build("gpemsr", 8, "small")
    weights.save(folder / "random.safetensors", network, licence="CC0-1.0 (random)")
    return {"preset": "small", "weights": str(folder / "random.safetensors")}


def measure(case: Case, slabs: int) -> dict[str, float]:
    y, x = SIDES[case.slab_mib]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_source(folder / "lr", (case.depth * slabs // 2, 2 * y, x), (case.depth, 64, 64))
        network = {"name": case.network} | (random_weights(folder) if case.network == "gpemsr" else {})
        prepared = ready(folder, source, "sr", (case.depth, y, x), network, case.in_flight, **TARGETS[case.target])
        with connect(ClusterConfig(workers=1), case.in_flight) as client:
            totals = drive_all(client, prepared).totals
    plan = prepared.job.plan
    share = stored_share(plan, totals.bytes, totals.voxels)
    promise = memory_bytes(plan, case.in_flight, totals.base_bytes, share, totals.network)
    return {
        "base_mib": totals.base_bytes / MIB,
        "peak_mib": totals.peak_bytes / MIB,
        "promise_mib": promise / MIB,
        "stored_share": share,
        "slabs_above_base": (totals.peak_bytes - totals.base_bytes) / MIB / case.slab_mib,
        "peak_over_promise": totals.peak_bytes / promise,
    }


def main(which: str = "few", slabs: str = "6") -> None:
    for case in {"few": FEW, "all": ALL}[which]:
        found = measure(case, int(slabs))
        title = f"{case.network}, {case.target} {case.slab_mib} MiB, {case.in_flight} in flight:"
        print(title, {key: round(value, 2) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
