"""What a plan costs, by formula: voxels read with halo, calls of the network, bytes of memory, voxels written."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass

from pipeline.base.geometry import ZYX
from pipeline.plan.plan import Plan, Slab


@dataclass(frozen=True)
class Input:
    """Source voxels of all slabs together.

    `owned` are those that are super-resolved, `requested` those with their halos, `decoded` those of all chunks
    touched, since a chunk is decoded whole; no cache is counted.
    """

    owned: int
    requested: int
    decoded: int


@dataclass(frozen=True)
class Calls:
    """What a plan asks of its network, in tiles: sections encoded, and windows fused."""

    encoded: int
    fused: int


@dataclass(frozen=True)
class Footprint:
    """Bytes that a network holds beyond its weights.

    `tile_bytes` are for the `batch` tiles that it computes at once. `cache_bytes` are for the encoded sections of one
    tile, which every slab leaves for the next slab in z. `landing_bytes` are, for each section of a slab, the grey
    levels of a batch on their way from the device into the slab, `pinned` where they come from a GPU.
    """

    tile_bytes: int = 0
    cache_bytes: int = 0
    batch: int = 1
    landing_bytes: int = 0
    pinned: bool = False

    @property
    def of_host(self) -> Footprint:
        """What of it is the process's own memory where a GPU holds the rest."""
        return Footprint(landing_bytes=self.landing_bytes, pinned=self.pinned)

    def landed_bytes(self, sections: int, in_flight: int) -> int:
        """All landings for slabs of so many sections. They are kept. A CPU has one; of a GPU's there are two for the
        slab that is being given to it and one for each other, of a power of two bytes, as PyTorch pins memory.
        """
        one = sections * self.landing_bytes
        return (in_flight + 1) * (1 << max(0, one - 1).bit_length()) if self.pinned and one else one

    def cached_bytes(self, tiles: int) -> int:
        """The encoded sections of so many tiles, of which only whole batches are computed."""
        return self.cache_bytes * -(-tiles // self.batch) * self.batch

    def slab_cache_bytes(self, plan: Plan) -> int:
        """The encoded sections of all tiles of a slab, which a lease carries from slab to slab."""
        return self.cached_bytes(plan.lattice.tiles(_middle(plan).lr))


def input_voxels(plan: Plan, chunk: ZYX) -> Input:
    """Sums over all slabs; boxes are products of axes, so each sum is a product of three short ones."""
    owned = requested = decoded = 1
    for axis in ("z", "y", "x"):
        origin, size = getattr(plan.bounds.start, axis), getattr(chunk, axis)
        spans = [(getattr(s.read.start, axis), getattr(s.read.stop, axis)) for s in _along(plan, axis)]
        owned *= getattr(plan.region.shape, axis)
        requested *= sum(stop - start for start, stop in spans)
        decoded *= sum((-(-(stop - origin) // size) - (start - origin) // size) * size for start, stop in spans)
    return Input(owned, requested, decoded)


def network_calls(plan: Plan, batch: int, slabs_per_lease: int) -> Calls:
    """Calls for all slabs, in leases of so many.

    A tile of a slab fuses a window for each of the slab's sections. Each section of a lease is encoded once for a tile,
    those of its z-halo too: the next lease encodes its own again. A slab's tiles go through the network in batches of
    one size, the last one filled up with repeats, which count.
    """
    leased = slabs_per_lease if plan.lattice.window > 1 else 1
    halo, bad = plan.lattice.z_halo, sorted(plan.bad_sections)
    encoded = 0
    for start in range(plan.region.start.z, plan.region.stop.z, leased * plan.slab_shape.z):
        stop = min(start + leased * plan.slab_shape.z, plan.region.stop.z)
        first, last = plan.section(start - halo), plan.section(stop - 1 + halo)
        encoded += last + 1 - first - (bisect_right(bad, last) - bisect_left(bad, first))
    rows, columns = _cells(plan, "y"), _cells(plan, "x")
    tiles = sum(
        slabs * others * -(-high * wide // batch) * batch
        for high, slabs in rows.items()
        for wide, others in columns.items()
    )
    return Calls(tiles * encoded, tiles * plan.region.shape.z)


def _cells(plan: Plan, axis: str) -> Counter[int]:
    """How many cells a slab touches along `axis`, and how many slabs in a row touch so many."""
    cell = plan.lattice.cell
    spans = [(getattr(slab.lr.start, axis), getattr(slab.lr.stop, axis)) for slab in _along(plan, axis)]
    return Counter(-(-stop // cell) - start // cell for start, stop in spans)


def slab_seconds(read_s: float, network_s: float, write_s: float, in_flight: int) -> float:
    """Seconds that a worker needs for each slab of many, `in_flight` of them at a time.

    They overlap, so that the slowest part decides; or the slab's own time, where too few are in flight.
    """
    return max(read_s, network_s, write_s, (read_s + network_s + write_s) / in_flight)


def _along(plan: Plan, axis: str) -> list[Slab]:
    """One slab per step along `axis`, at the region's start on the others."""
    count, step = getattr(plan.grid, axis), getattr(plan.slab_shape, axis)
    shift = {"z": ZYX(step, 0, 0), "y": ZYX(0, step, 0), "x": ZYX(0, 0, step)}[axis]
    return [plan.slab(plan.slab_at(plan.region.start + shift * i)) for i in range(count)]


def memory_bytes(plan: Plan, in_flight: int, base: int, share: float, network: Footprint) -> int:
    """Peak resident bytes promised for one worker.

    They are `base` (the process with the job open), the slabs in flight, and `network`, what the network holds in the
    worker's own memory. `share` is stored over raw bytes.

    Of the slabs in flight one computes (LR and SR voxels), one encodes (SR voxels, the objects of mip 0 so far, and the
    largest of these twice more: in the store's buffers and while it is copied out), and others put (the objects of all
    levels, and the copy that is being sent) or wait (LR and SR voxels: for the end of what a GPU has been given, or for
    the encoder). Tasks of the second pass, later, may need more. The constants are what libraries keep once they have
    run, and the bounded cache of source chunks.
    """
    slab = _middle(plan)
    sr, lr = slab.write.size, slab.read.shape.product
    first, held = int(sr * share), int(_slab_output(plan, slab) * share)
    largest = min(first, int(plan.levels[0].shard.product * share))
    computing = lr + sr + network.tile_bytes
    waiting = lr + sr
    encoding = lr + sr + first + 2 * largest
    putting = 2 * held
    if in_flight == 1:
        slabs = max(computing, encoding, putting + largest)
    else:
        slabs = encoding + max(computing, putting) + (in_flight - 2) * max(waiting, putting)
    slabs = max(slabs + in_flight * network.slab_cache_bytes(plan), in_flight * 2 * _second_pass_read(plan))
    landed = network.landed_bytes(slab.lr.shape.z, in_flight)
    return base + landed + slabs + WARM_BYTES + min(READ_CACHE_BYTES, plan.bounds.size)


WARM_BYTES = 24 << 20
READ_CACHE_BYTES = 64 << 20


def stored_share(plan: Plan, stored: int, voxels: int) -> float:
    """Stored over raw bytes, from `stored` bytes of all levels for `voxels` SR voxels of mip 0; 1 where there are none
    yet.
    """
    return stored / (voxels / plan.levels[0].shape.product * output_voxels(plan)) if voxels else 1.0


def _middle(plan: Plan) -> Slab:
    return plan.slab(plan.slab_at(plan.region.start + plan.region.shape // 2))


def _second_pass_read(plan: Plan) -> int:
    """Voxels that the largest task of the second pass reads: it holds them once decoded and once as they arrive."""
    return max((plan.pyramid_block(stage.start).read.size for stage in plan.passes()[1:]), default=0)


def _slab_output(plan: Plan, slab: Slab) -> int:
    """Voxels of everything that a slab writes."""
    return sum(plan.level_box(slab, level).size for level in range(plan.levels_by_slabs)) + (
        slab.lr.size if plan.fidelity else 0
    )


def output_voxels(plan: Plan) -> int:
    """Voxels (= bytes before compression) of all levels and the fidelity volume."""
    sizes: list[ZYX] = [level.shape for level in plan.levels] + ([plan.fidelity.shape] if plan.fidelity else [])
    return sum(size.product for size in sizes)
