"""`run --dry-run`: the price on the terminal, with seconds and compression from one slab tried on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.table import Table

from pipeline.base.errors import ClusterError, DataError
from pipeline.cluster.connect import slabs_in_flight
from pipeline.inference.footprint import footprint
from pipeline.plan.price import input_voxels, memory_bytes
from pipeline.plan.target_spec import FIDELITY
from pipeline.prepare.mask_reach import reach
from pipeline.prepare.prepared import Prepared
from pipeline.process.children import starting_processes
from pipeline.worker.check import refuse_other_precision
from pipeline.worker.job import Job, SlabCost
from pipeline.worker.measure import measure_slab


def measured_cost(job: Job) -> SlabCost:
    """What the slab in the volume's middle costs. It is tried in a fresh process like a worker's."""
    with starting_processes(), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_slab, job).result()


def print_price(prepared: Prepared, workers: int, say: Callable[[str], None] = print) -> None:
    """The price as a table on the terminal, for so many workers."""
    job, source, plan = prepared.job, prepared.source, prepared.job.plan
    in_flight = slabs_in_flight(prepared.config)
    cost: SlabCost | None = None
    try:
        refuse_other_precision(job.network)
        cost = measured_cost(job)
    except ClusterError as error:
        say(f"There is no calibration: {error.saw}")
    except DataError as error:
        say(f"The middle of the volume cannot be read, so there is no calibration: {error}")
    read = input_voxels(plan, source.chunk_shape)
    dtype = ", uint16" if source.dtype == "uint16" else ""
    say(f"source   {source.format}, {source.bounds.shape} LR voxels{dtype}, read by {source.reader}")
    say(
        f"slabs    {plan.slabs:,} of {plan.slab_shape} LR voxels"
        + (f", then {plan.tasks - plan.slabs:,} pyramid blocks" if plan.tasks > plan.slabs else "")
    )
    say(
        f"read     {_size(read.requested)} for {_size(read.owned)} "
        f"(halo x{read.requested / read.owned:.2f}, whole chunks x{read.decoded / read.owned:.2f})"
    )
    if (mask := reach(prepared)) is not None:
        say(f"mask     {mask}")
    table = Table("level", "shape", "shard", "raw", "stored (estimate)", title=None)
    total_raw = total_stored = 0
    for k, level in enumerate([*plan.levels, *([plan.fidelity] if plan.fidelity else [])]):
        share = (
            None
            if cost is None
            else cost.stored_share.get(
                k if k < len(plan.levels) else FIDELITY, cost.stored_share[max(cost.stored_share)]
            )
        )
        raw = level.shape.product
        total_raw += raw
        total_stored += int(raw * (share or 1))
        name = str(k) if k < len(plan.levels) else "fidelity"
        table.add_row(name, str(level.shape), str(level.shard), _size(raw), _size(int(raw * share)) if share else "?")
    table.add_row("all", "", "", _size(total_raw), _size(total_stored) if cost else "?")
    Console(width=110).print(table)
    if cost is not None:
        busy = max(cost.network_s, cost.write_s, cost.read_s)
        hours = plan.slabs * busy / 3600
        memory = memory_bytes(plan, in_flight, cost.base_bytes, cost.stored_share[0], cost.network)
        held = footprint(job.network, gpu=cost.gpu_weights is not None)
        cached = in_flight * held.slab_cache_bytes(plan)
        network = f"network's tile {_size(held.tile_bytes)}, encoded sections {_size(cached)}"
        if cost.gpu_weights is None:
            say(
                f"memory   {_size(memory)} per worker "
                f"({in_flight} slabs in flight, process {_size(cost.base_bytes)}, {network})"
            )
        else:
            say(f"memory   {_size(memory)} per worker ({in_flight} slabs in flight, process {_size(cost.base_bytes)})")
            say(
                f"GPU      {_size(cost.gpu_weights + held.tile_bytes + cached)} per worker "
                f"(weights {_size(cost.gpu_weights)}, {network})"
            )
        say(
            f"one slab {cost.read_s:.2f} s read, {cost.network_s:.2f} s network, {cost.write_s:.2f} s encode "
            "(tried on this machine)"
        )
        say(f"time     {_hours(hours)} on one worker like this machine, {_hours(hours / workers)} on {workers}")


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} minutes"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
