"""FAFB v14 as a job for plan and price: a whole fly brain, ssTEM, 40 nm sections, from 32 or 64 nm pixels to 4 nm.

The bounding box is that of natverse/elmr, data/templatebrains.R (FAFB14). About 106 TB of it are tissue. The rest is
skipped by a mask, which is taken to be the complement of an ellipse in every section.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import TargetConfig
from pipeline.plan.lattice import Lattice
from pipeline.plan.measured_devices import MEASURED_DEVICES
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.plan.price import network_calls
from pipeline.plan.rates import Fit
from pipeline.prepare import layout

SECTIONS = 7062
FINE = ZYX(SECTIONS, 155_648, 253_952)
TISSUE = 106e12 / FINE.product
"""Share of the bounding box that is tissue."""
SOURCE_CHUNK = ZYX(8, 256, 256)
SLABS_PER_LEASE = 4


class Work(NamedTuple):
    """Floating-point operations (two per multiply-add) of one tile of the paper's network, with all exact savings: what
    is done once per section (also for the z-halo of a lease) and once per window.
    """

    per_section: float
    per_window: float


@cache
def work(scale: int, tile: int, halo: int) -> Work:
    """Operations counted on meta tensors, which hold no data. Attention grows with the square of the tile's area."""
    network: Any = models.build("gpemsr", scale, "paper").to("meta").eval()
    with torch.inference_mode():
        with FlopCounterMode(display=False) as section:
            state = network.encode_section(torch.zeros(1, 1, tile, tile, device="meta"))
        with FlopCounterMode(display=False) as window:
            network.fuse_window([state] * 5, halo)
    return Work(section.get_total_flops(), window.get_total_flops())


CPU_CORE_TFLOPS = 0.090 * 0.6
"""A core does 90 GFLOP/s at best, and 0.6 of that is reached."""


def plan_of(scale: int, target: TargetConfig, cell: int | None = None) -> Plan:
    """The plan with default shapes; without `cell` the network's own."""
    traits = models.NETWORKS["gpemsr"]
    lattice = Lattice(cell or traits.cell, traits.halo[scale], traits.window, traits.padding)
    region = ZYX(FINE.z, FINE.y // scale, FINE.x // scale)
    shapes = layout.choose(region, scale, target, None)
    box = Box.at(ZYX(0, 0, 0), region)
    return Plan(
        box, box, shapes.slab_shape, scale, lattice, shapes.levels, shapes.fidelity, lossy=target.encoding == "jpeg"
    )


def slab_flop(plan: Plan) -> float:
    """Floating-point operations of a slab, in the mean."""
    done, calls = work(plan.scale, plan.lattice.tile, plan.lattice.halo), network_calls(plan, 1, SLABS_PER_LEASE)
    return (done.per_section * calls.encoded + done.per_window * calls.fused) / plan.slabs


def h100_fits(plan: Plan) -> dict[str, Fit]:
    """What a tile takes on an H100, by precision."""
    (h100,) = MEASURED_DEVICES
    return h100.fits(NetworkSpec("gpemsr", plan.scale, "paper", "", "float32", plan.lattice))


def h100_slab_seconds(plan: Plan, precision: str) -> float:
    """What an H100 computes for a slab, in the mean."""
    return h100_fits(plan)[precision].seconds(network_calls(plan, 1, SLABS_PER_LEASE)) / plan.slabs


def is_tissue(plan: Plan, index: int) -> bool:
    """Whether the slab's column lies in the ellipse that covers TISSUE of every section."""
    iy, ix = divmod(index // plan.grid.z, plan.grid.x)
    y, x = 2 * (iy + 0.5) / plan.grid.y - 1, 2 * (ix + 0.5) / plan.grid.x - 1
    return y * y + x * x < TISSUE * 4 / 3.141592653589793


def puts_per_slab(plan: Plan) -> int:
    """Objects that a slab inside the volume writes."""
    sr = plan.slab_shape.lateral(plan.scale)
    boxes = [(sr.z, sr.y >> k, sr.x >> k) for k in range(plan.levels_by_slabs)]
    count = sum(ZYX(*box).ceil_div(level.shard).product for box, level in zip(boxes, plan.levels, strict=False))
    return count + (plan.slab_shape.ceil_div(plan.fidelity.shard).product if plan.fidelity else 0)
