"""Measures what a slab costs the processor after the network: SR voxels per second through each part, in MB.

    python benchmarks/encoding.py [side=512] [repeats=5]

One slab of 8 x side x side LR voxels of made tissue, enlarged eightfold by bicubic and by noise of one grey level, into
a target of all defaults. Every part is called alone, in one thread, after the one before it: encoding mip 0, the
fidelity volume, the means of 2 x 2 and encoding them, the checksum, putting. `cpu` counts the processor's time of the
whole process, libraries' threads included, `wall` what passed; each is the best of the repeats.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from parts.tissue_job import ready, write_source

from pipeline.inference.tiles import super_resolve
from pipeline.plan.target_spec import FIDELITY
from pipeline.storage.targets.task_objects import checksum
from pipeline.worker.fidelity import back_projection_error
from pipeline.worker.open_job import open_job
from pipeline.worker.pyramid import halve
from pipeline.worker.slab import encode_slab, owned_voxels, read_with_halo

DEPTH = 8
T = TypeVar("T")


def main(side: int = 512, repeats: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, shape = Path(name), (DEPTH, side, side)
        source = write_source(folder / "lr", shape, (DEPTH, 64, 64))
        opened = open_job(ready(folder, source, "sr", shape, {"name": "bicubic"}).job)
        plan, target = opened.plan, opened.target
        slab = plan.slab(0)
        lr, sections = read_with_halo(opened, slab)
        owned = owned_voxels(plan, slab, lr)
        sr = super_resolve(opened.network, lr, sections, slab)
        sr += np.random.default_rng(0).integers(0, 2, sr.shape, np.uint8) * (sr < 255)

        def part(name: str, call: Callable[[], T]) -> T:
            best = [float("inf")] * 2
            for _ in range(repeats):
                wall, cpu = time.perf_counter(), time.process_time()
                result = call()
                spent = time.perf_counter() - wall, time.process_time() - cpu
                best = [min(pair) for pair in zip(best, spent, strict=True)]
            rates = (f"{sr.size / seconds / 1e6:,.0f}" for seconds in best)
            print(f"| {name} | {' | '.join(rates)} |", flush=True)
            return result

        print("| part | MB/s, wall | MB/s, cpu |\n|---|---|---|")
        part("read", lambda: read_with_halo(opened, slab))
        objects = part("encode mip 0", lambda: target.encode(0, slab.write, sr))
        share = sum(map(len, objects.values())) / sr.size
        error = part("fidelity", lambda: back_projection_error(owned, sr, plan.scale))
        part("encode fidelity", lambda: target.encode(FIDELITY, plan.fidelity_box(slab), error))
        half = part("halve", lambda: halve(sr))
        if plan.levels_by_slabs > 1:
            part("encode mip 1", lambda: target.encode(1, plan.level_box(slab, 1), half))
        objects = part("all that is encoded", lambda: encode_slab(opened, slab, owned, sr))
        part("checksum", lambda: checksum(objects))
        part("put", lambda: target.put(objects))
        print(f"\nstored over raw, mip 0: {share:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
