"""`run --dry-run`: the price on the terminal.

Seconds and compression are those of one slab tried on this machine. What the network takes comes from the device that
`cluster.measured` names, where it does.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

from rich.console import Console
from rich.table import Table

from pipeline.base.errors import ClusterError, DataError
from pipeline.base.words import counted
from pipeline.cluster.connect import slabs_in_flight
from pipeline.inference.defaults import for_workers
from pipeline.inference.footprint import footprint
from pipeline.plan.measured_devices import MEASURED_DEVICES
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.plan.price import input_voxels, memory_bytes
from pipeline.plan.rates import MeasuredDevice
from pipeline.plan.target_spec import FIDELITY
from pipeline.prepare.holes import look
from pipeline.prepare.hours import Fleet, duration
from pipeline.prepare.mask_reach import reach
from pipeline.prepare.measured import check_precision, facts
from pipeline.prepare.prepared import Prepared
from pipeline.process.children import starting_processes
from pipeline.worker.check import refuse_other_precision
from pipeline.worker.job import Job, SlabCost
from pipeline.worker.measure import measure_slab, measure_without_network

SAY_S = 10.0
WIDTH = 110
"""Of tables, in characters."""


def measured_cost(job: Job, network: bool) -> SlabCost:
    """What the slab in the volume's middle costs, with its network or without. It is tried in a fresh process like a
    worker's. The error output says so every SAY_S seconds.
    """
    hint = " (with cluster.measured no network is tried)" if network and job.network.weights else ""
    measure = measure_slab if network else measure_without_network
    began = time.monotonic()
    with starting_processes(), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        tried = pool.submit(measure, job)
        while True:
            with suppress(TimeoutError):
                return tried.result(SAY_S)
            print(f"emsr: trying one slab here, {time.monotonic() - began:.0f} s so far{hint}", file=sys.stderr)


def print_price(
    prepared: Prepared, device: MeasuredDevice | None, workers: int, slabs_in_lease: Callable[[float], int]
) -> None:
    """The price as tables on the terminal, for so many workers.

    `device` is that of `cluster.measured`. `slabs_in_lease` tells from the seconds that a thread takes for a slab how
    many make a lease. Raises UserError where the device was not measured in the precision of the run.
    """
    job, source, plan, cluster = prepared.job, prepared.source, prepared.job.plan, prepared.config.cluster
    if device is not None:
        check_precision(device, job.network)
    cost: SlabCost | None = None
    try:
        cost = measured_cost(job, network=device is None and _computes(job.network))
    except DataError as error:
        print(f"The middle of the volume cannot be read, so there is no calibration: {error}")
    read = input_voxels(plan, source.chunk_shape)
    dtype = f", {source.dtype}" if source.dtype != "uint8" else ""
    print(f"source   {source.format}, {source.bounds.shape} LR voxels{dtype}, read by {source.reader}")
    print(
        f"slabs    {plan.slabs:,} of {plan.slab_shape} LR voxels"
        + (f", then {plan.tasks - plan.slabs:,} pyramid blocks" if plan.tasks > plan.slabs else "")
    )
    print(
        f"read     {_size(read.requested)} for {_size(read.owned)} "
        f"(halo x{read.requested / read.owned:.2f}, whole chunks x{read.decoded / read.owned:.2f})"
    )
    if (holes := look(prepared)) is not None:
        print(f"holes    {holes}")
    share = 1.0
    if (mask := reach(prepared)) is not None:
        print(f"mask     {mask}")
        share = mask.touched / mask.looked
    _print_levels(prepared, cost)
    if cost is None:
        return
    _print_memory(prepared, cost, device)
    in_flight = slabs_in_flight(prepared.config)
    fleet = Fleet(workers, in_flight, plan.slabs * share, cluster.price_per_hour, slabs_in_lease)
    if fleet.busy < workers:
        print(f"workers  {fleet.busy:,} of {workers:,} get a slab; a smaller work.slab_shape makes more of them")
    if device is None:
        _print_tried(prepared, cost, fleet)
    else:
        print(f"one slab {cost.read_s:.2f} s read, {cost.write_s:.2f} s encode (tried on this machine)")
        _print_device(plan, job.network, cost, fleet, device)


def _computes(network: NetworkSpec) -> bool:
    """Whether this machine's device computes in the network's precision; a line says it where not."""
    try:
        refuse_other_precision(network)
    except ClusterError as error:
        print(f"The network is not tried on this machine: {error.saw}")
        return False
    return True


def _print_levels(prepared: Prepared, cost: SlabCost | None) -> None:
    plan = prepared.job.plan
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
    Console(width=WIDTH).print(table)


def _print_memory(prepared: Prepared, cost: SlabCost, device: MeasuredDevice | None) -> None:
    plan, in_flight = prepared.job.plan, slabs_in_flight(prepared.config)
    gpu = device.is_gpu if device is not None else cost.gpu_weights is not None or cost.network_s is None
    held = footprint(prepared.job.network, gpu)
    resident = cost.network if device is None else held.of_host if gpu else held
    memory = memory_bytes(plan, in_flight, cost.base_bytes, cost.stored_share[0], resident)
    cached = in_flight * held.slab_cache_bytes(plan)
    network = f"network's tile {_size(held.tile_bytes)}, encoded sections {_size(cached)}"
    promised = (
        f"memory   {_size(memory)} per worker ({counted(in_flight, 'slab')} in flight, process {_size(cost.base_bytes)}"
    )
    if cost.gpu_weights is not None:
        print(f"{promised})")
        total = _size(cost.gpu_weights + held.tile_bytes + cached)
        print(f"GPU      {total} per worker (weights {_size(cost.gpu_weights)}, {network})")
    elif gpu:
        print(f"{promised})")
        print(f"GPU      {_size(held.tile_bytes + cached)} per worker beside the weights ({network})")
    else:
        print(f"{promised}, {network})")


def _print_tried(prepared: Prepared, cost: SlabCost, fleet: Fleet) -> None:
    """Hours by the slab that was tried here; beside them those of measured devices, where the workers are elsewhere."""
    cluster, network = prepared.config.cluster, prepared.job.network
    elsewhere = cost.gpu_weights is None and (cluster.kind != "local" or bool(cluster.gpus_per_worker))
    if cost.network_s is None:
        print(f"one slab {cost.read_s:.2f} s read, {cost.write_s:.2f} s encode (tried on this machine)")
    else:
        hours = fleet.hours(cost, cost.network_s)
        like = "this machine's CPU" if elsewhere else "this machine"
        print(
            f"one slab {cost.read_s:.2f} s read, {cost.network_s:.2f} s network, {cost.write_s:.2f} s encode "
            "(tried on this machine)"
        )
        print(
            f"time     {duration(hours.workers)} on one worker like {like}, "
            f"{fleet.together(hours)} on {fleet.workers}"
            + ("" if fleet.price is None else f"; cost {fleet.money(hours)} at {fleet.price:g} an hour")
        )
    if not elsewhere:
        return
    print(
        "         The workers are elsewhere: set cluster.measured to what `emsr doctor --json` wrote on such a machine"
    )
    for device in MEASURED_DEVICES if cluster.gpus_per_worker != 0 else ():
        if device.fits(network):
            stated, bounds = prepared.config.network, prepared.source.bounds
            there = for_workers(network, stated, bounds, [facts(device, network)])
            _print_device(prepared.job.plan, there, cost, fleet, device)


def _print_device(plan: Plan, network: NetworkSpec, cost: SlabCost, fleet: Fleet, device: MeasuredDevice) -> None:
    """A row of hours for each precision in which the network was measured on `device`."""
    print(
        f"time     of {counted(round(fleet.slabs), 'slab')} on {device.kind}, measured on {device.date} ({device.how})"
    )
    Console(width=WIDTH).print(fleet.table(plan, network, device, cost))
    for precision, fit in device.fits(network).items():
        if fit.scaled != 1 or not fit.same_batch:
            print(
                f"         {precision} was not measured at tile {network.lattice.tile}, batch {network.batch}: "
                f"hours are those of {fit.rate}, by voxels (x {fit.scaled:.2f})"
            )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
