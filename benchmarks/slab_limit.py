"""Measures a whole slab of bicubic or nearest against what writing its voxels costs at least: CPU seconds and ratios.

    python benchmarks/slab_limit.py [network=bicubic] [side=512] [repeats=7]

One slab of 8 x side x side LR voxels of made tissue, x8, into a target of all defaults: blosc-zstd, shards of one slab,
all mips that slabs write, the fidelity volume. Three ways, turn about, in one process:

* slab: `process_slab`, all of it, from reading the source to the receipt;
* limit: tensorstore encodes and writes the slab's SR voxels, which are there already, with the same codec and shards
  into files: mip 0 alone;
* all levels: as the limit, of every array that the slab writes, whose voxels are there already.

Printed are the medians of the process's CPU seconds, libraries' threads included, and the medians of the ratios of each
round; then the CPU seconds of each part of a slab, called alone.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tensorstore as ts
from parts.tissue_job import ready, write_source

from pipeline.inference.tiles import super_resolve
from pipeline.plan.target_spec import FIDELITY
from pipeline.storage.targets import ome_zarr_target
from pipeline.storage.targets.task_objects import checksum
from pipeline.worker.fidelity import back_projection_error
from pipeline.worker.open_job import open_job
from pipeline.worker.pyramid import halve
from pipeline.worker.slab import owned_voxels, process_slab, read_with_halo

DEPTH = 8
T = TypeVar("T")


class Scene:
    """A job of one slab, and the voxels of everything that the slab writes."""

    def __init__(self, folder: Path, network: str, side: int) -> None:
        shape = (DEPTH, side, side)
        self.folder = folder
        source = write_source(folder / "lr", shape, (DEPTH, 64, 64))
        self.opened = open_job(ready(folder, source, "sr", shape, {"name": network}).job)
        plan = self.opened.plan
        self.slab = plan.slab(0)
        self.lr, self.sections = read_with_halo(self.opened, self.slab)
        self.owned = owned_voxels(plan, self.slab, self.lr)
        self.voxels = {0: super_resolve(self.opened.network, self.lr, self.sections, self.slab)}
        for level in range(1, plan.levels_by_slabs):
            self.voxels[level] = halve(self.voxels[level - 1])
        self.voxels[FIDELITY] = back_projection_error(self.owned, self.voxels[0], plan.scale)

    def write(self, *levels: int) -> None:
        """tensorstore encodes and writes the voxels of `levels` into new arrays in files."""
        arrays = ome_zarr_target.arrays(self.opened.job.target)
        for level in levels:
            path = self.folder / "limit" / str(level)
            spec = arrays[level].known | {"kvstore": {"driver": "file", "path": f"{path}/"}}
            box = tuple(slice(n) for n in self.voxels[level].shape)
            ts.open(spec, create=True).result()[box].write(self.voxels[level]).result()
        shutil.rmtree(self.folder / "limit")


def cpu_s(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def main(network: str = "bicubic", side: str = "512", repeats: str = "7") -> None:
    with tempfile.TemporaryDirectory() as name:
        scene = Scene(Path(name), network, int(side))
        ways: dict[str, Callable[[], object]] = {
            "slab": lambda: process_slab(scene.opened, 0),
            "limit": lambda: scene.write(0),
            "all levels": lambda: scene.write(*scene.voxels),
        }
        rounds = [{way: cpu_s(call) for way, call in ways.items()} for _ in range(int(repeats) + 1)][1:]
        for way in ways:
            seconds, ratio = (
                statistics.median(found) for found in ([r[way] for r in rounds], [r[way] / r["limit"] for r in rounds])
            )
            print(f"| {way} | {seconds:.3f} s | {ratio:.2f} |", flush=True)
        for part, seconds in parts(scene, int(repeats)).items():
            print(f"| {part} | {seconds:.3f} s |", flush=True)


def parts(scene: Scene, repeats: int) -> dict[str, float]:
    """The median CPU seconds of each part of a slab."""
    opened, slab, voxels = scene.opened, scene.slab, scene.voxels
    plan, target = opened.plan, opened.target
    boxes = {level: plan.fidelity_box(slab) if level == FIDELITY else plan.level_box(slab, level) for level in voxels}
    coarser = [level for level in voxels if level > 0]
    objects = {level: target.encode(level, boxes[level], voxels[level]) for level in voxels}
    everything = {key: value for level in objects.values() for key, value in level.items()}
    ways: dict[str, Callable[[], object]] = {
        "read": lambda: read_with_halo(opened, slab),
        "network": lambda: super_resolve(opened.network, scene.lr, scene.sections, slab),
        "encode mip 0": lambda: target.encode(0, boxes[0], voxels[0]),
        "fidelity": lambda: back_projection_error(scene.owned, voxels[0], plan.scale),
        "encode fidelity": lambda: target.encode(FIDELITY, boxes[FIDELITY], voxels[FIDELITY]),
        "means of 2 x 2": lambda: [halve(voxels[level - 1]) for level in coarser],
        "encode coarser mips": lambda: [target.encode(level, boxes[level], voxels[level]) for level in coarser],
        "put": lambda: target.put(everything),
        "checksum": lambda: checksum(everything),
    }
    return {part: statistics.median(cpu_s(call) for _ in range(repeats)) for part, call in ways.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
