"""One slab tried and not written: what `run --dry-run` measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pipeline.base.geometry import ZYX, Box
from pipeline.base.waits import LIMIT_S, no_answer, say
from pipeline.inference.tiles import DEVICE_LOCK, super_resolve
from pipeline.plan.lattice import Lattice
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Slab
from pipeline.plan.target_spec import FIDELITY
from pipeline.process.watchdog import run_watched
from pipeline.storage.volume import Uint8Array
from pipeline.worker.job import Job, SlabCost
from pipeline.worker.open_job import OpenJob, open_job
from pipeline.worker.slab import encode_slab, owned_voxels, read_with_halo


def measure_slab(job: Job) -> SlabCost:
    """Read, compute and encode the slab in the middle of the region; of its tiles one batch is computed.

    Raises what `process_slab` raises, NoAnswerError where nothing goes on for work.stall_s.
    """
    return _watched(job, lambda: _measured(job))


def measure_without_network(job: Job) -> SlabCost:
    """Read and encode the slab in the middle of the region, for a job whose network is for other devices than this.

    What is encoded is the slab enlarged by bicubic interpolation. Raises what `measure_slab` raises.
    """
    return _watched(job, lambda: _read_and_encoded(job))


def _watched(job: Job, measure: Callable[[], SlabCost]) -> SlabCost:
    costs: list[SlabCost] = []
    stall_s = max(job.stall_s, LIMIT_S)
    stall = run_watched(lambda: costs.append(measure()), stall_s, say)
    if stall is not None:
        raise no_answer(stall.what or f"the network\n{stall.stack}", stall_s)
    return costs[0]


def _measured(job: Job) -> SlabCost:
    opened = open_job(job)
    slab = _middle(job)
    read_with_halo(opened, slab)  # once unmeasured: the first call builds caches
    began = time.perf_counter()
    lr, sections = read_with_halo(opened, slab)
    read_s = time.perf_counter() - began
    with DEVICE_LOCK:
        network_s, sr = _computed(opened, slab, lr, sections)
    write_s, share = _encoded(opened, slab, owned_voxels(job.plan, slab, lr), sr)
    return SlabCost(
        read_s,
        network_s,
        write_s,
        share,
        opened.base_bytes,
        opened.network.resident,
        opened.network.weight_bytes if opened.network.device.type == "cuda" else None,
    )


def _computed(opened: OpenJob, slab: Slab, lr: Uint8Array, sections: list[int]) -> tuple[float, Uint8Array]:
    """Seconds of the network for a slab, of which one batch of tiles is computed: all take as long. And SR voxels for
    all of the slab, those of that batch's first cell over and over.
    """
    lattice, shape = opened.plan.lattice, slab.write.shape
    cells = list(lattice.cells(slab.lr))
    cell = max(cells, key=lambda each: each.size)
    top = Box(cell.start, ZYX(cell.start.z + 1, cell.stop.y, cell.stop.x))
    # one section unmeasured: first calls compile kernels; a GPU then records its graphs, and pins memory
    super_resolve(opened.network, lr[: lattice.window], sections[: lattice.window], replace(slab, lr=top))
    if opened.network.device.type == "cuda":
        super_resolve(opened.network, lr, sections, replace(slab, lr=cell))
    began = time.perf_counter()
    sr = super_resolve(opened.network, lr, sections, replace(slab, lr=cell))
    seconds = (time.perf_counter() - began) * -(-len(cells) // opened.network.spec.batch)
    times = (1, -(-shape.y // sr.shape[1]), -(-shape.x // sr.shape[2]))
    return seconds, np.ascontiguousarray(np.tile(sr, times)[:, : shape.y, : shape.x])


def _read_and_encoded(job: Job) -> SlabCost:
    spec = NetworkSpec("bicubic", job.plan.scale, None, "", "float32", Lattice(job.plan.lattice.cell, 8, 1, "edge"))
    opened = open_job(replace(job, network=spec))
    slab = _middle(job)
    read_with_halo(opened, slab)  # once unmeasured: the first call builds caches
    began = time.perf_counter()
    lr, _ = read_with_halo(opened, slab)
    read_s = time.perf_counter() - began
    halo = job.plan.lattice.z_halo
    with DEVICE_LOCK:
        sr = super_resolve(opened.network, lr[halo : len(lr) - halo], range(slab.lr.shape.z), slab)
    write_s, share = _encoded(opened, slab, owned_voxels(job.plan, slab, lr), sr)
    return SlabCost(read_s, None, write_s, share, opened.base_bytes)


def _middle(job: Job) -> Slab:
    return job.plan.slab(job.plan.slab_at(job.plan.region.start + job.plan.region.shape // 2))


def _encoded(opened: OpenJob, slab: Slab, owned: Uint8Array, sr: Uint8Array) -> tuple[float, dict[int, float]]:
    """Seconds that encoding takes, and stored over raw bytes by level."""
    plan, began = opened.plan, time.perf_counter()
    objects = encode_slab(opened, slab, owned, sr)
    seconds, share = time.perf_counter() - began, {}
    for level in [*range(plan.levels_by_slabs), *([FIDELITY] if plan.fidelity is not None else [])]:
        box = plan.fidelity_box(slab) if level == FIDELITY else plan.level_box(slab, level)
        share[level] = sum(len(objects[key]) for key in opened.target.keys(level, box)) / box.size
    return seconds, share
