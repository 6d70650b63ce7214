"""One slab tried and not written: what `run --dry-run` measures."""

from __future__ import annotations

import time

from pipeline.base.waits import LIMIT_S, no_answer, say
from pipeline.inference.tiles import DEVICE_LOCK, super_resolve
from pipeline.plan.target_spec import FIDELITY
from pipeline.process.watchdog import run_watched
from pipeline.worker.job import Job, SlabCost
from pipeline.worker.open_job import open_job
from pipeline.worker.slab import encode_slab, owned_voxels, read_with_halo


def measure_slab(job: Job) -> SlabCost:
    """Read, compute and encode the slab in the middle of the region.

    Raises what `process_slab` raises, NoAnswerError where nothing goes on for work.stall_s.
    """
    costs: list[SlabCost] = []
    stall_s = max(job.stall_s, LIMIT_S)
    stall = run_watched(lambda: costs.append(_measured(job)), stall_s, say)
    if stall is not None:
        raise no_answer(stall.what or f"the network\n{stall.stack}", stall_s)
    return costs[0]


def _measured(job: Job) -> SlabCost:
    opened = open_job(job)
    plan = job.plan
    slab = plan.slab(plan.slab_at(plan.region.start + plan.region.shape // 2))
    with DEVICE_LOCK:  # once unmeasured: the first call builds caches
        super_resolve(opened.network, *read_with_halo(opened, slab), slab)
    began = time.perf_counter()
    lr, sections = read_with_halo(opened, slab)
    read = time.perf_counter()
    sr = super_resolve(opened.network, lr, sections, slab)
    computed = time.perf_counter()
    objects = encode_slab(opened, slab, owned_voxels(plan, slab, lr), sr)
    encoded = time.perf_counter()
    share = {}
    for level in [*range(plan.levels_by_slabs), *([FIDELITY] if plan.fidelity is not None else [])]:
        box = plan.fidelity_box(slab) if level == FIDELITY else plan.level_box(slab, level)
        share[level] = sum(len(objects[key]) for key in opened.target.keys(level, box)) / box.size
    return SlabCost(
        read - began,
        computed - read,
        encoded - computed,
        share,
        opened.base_bytes,
        opened.network.resident,
        gpu_weights=opened.network.weight_bytes if opened.network.device.type == "cuda" else None,
    )
