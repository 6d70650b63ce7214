"""What was chosen for a network, and what its batches and slabs compute in vain, in words."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.inference.defaults import undecided
from pipeline.plan.plan import Plan
from pipeline.prepare.prepared import Prepared
from pipeline.worker.job import Job

MUCH = 1.5
"""What is computed so many times as it need be is said."""


def describe(prepared: Prepared) -> Iterator[str]:
    """The network's lattice, precision and batch; then what of it is computed in vain."""
    network, stated = prepared.job.network, prepared.config.network
    by = "this machine's device" if prepared.config.cluster.measured is None else "the device of cluster.measured"
    chosen = " and ".join(key for key in ("precision", "batch") if getattr(stated, key) is None)
    device = f" ({chosen} by {by}; a run takes what its workers have)"
    yield (
        f"network  {network.name} x{network.scale}, cell {network.lattice.cell}, halo {network.lattice.halo}, "
        f"precision {network.precision}, batch {network.batch}{device * undecided(stated)}"
    )
    yield from in_vain(prepared.job)


def in_vain(job: Job) -> Iterator[str]:
    """A line where slabs share many cells, and one where many tiles only fill up batches.

    Networks without weights cost nothing, so nothing is said of them.
    """
    plan, batch = job.plan, job.network.batch
    if not job.network.weights:
        return
    slab, cell = plan.slab_shape, plan.lattice.cell
    shared = _tiles_of_slabs(plan) / plan.lattice.tiles(plan.region)
    if shared >= MUCH:
        yield (
            f"cells    each of them is computed {shared:.1f} times: work.slab_shape {slab} is no multiple of "
            f"network.cell {cell} in y and x, and a slab computes the whole of each cell that it touches"
        )
    tiles = plan.lattice.tiles(plan.slab(plan.slab_at(plan.region.start + plan.region.shape // 2)).lr)
    computed = -(-tiles // batch) * batch
    if computed >= MUCH * tiles:
        fits = max(each for each in range(1, min(batch, tiles) + 1) if tiles % each == 0)
        yield (
            f"batch    {computed - tiles} of {computed} tiles are repeats, since a slab has {tiles} and "
            f"network.batch is {batch}: take a larger work.slab_shape, or network.batch {fits}"
        )


def _tiles_of_slabs(plan: Plan) -> int:
    """The tiles that all slabs of a section take together. Slabs are products of axes, so the sum is one of sums."""
    total, cell = 1, plan.lattice.cell
    for axis in ("y", "x"):
        first, stop, step = (getattr(of, axis) for of in (plan.region.start, plan.region.stop, plan.slab_shape))
        total *= sum(-(-min(at + step, stop) // cell) - at // cell for at in range(first, stop, step))
    return total
