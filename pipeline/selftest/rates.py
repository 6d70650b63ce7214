"""How fast a device is: a large matrix product, and a network on the path of a run."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from pipeline.inference.footprint import needed_bytes
from pipeline.inference.network import Network
from pipeline.inference.tiles import SectionCaches, super_resolve
from pipeline.plan.network_spec import NetworkSpec
from pipeline.process import device
from pipeline.selftest.findings import RateFound
from pipeline.selftest.networks import Window, run_window
from pipeline.selftest.same import strip

TYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MATRIX = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices of the product that a network's rate is a share of."""
SECTIONS = {"cuda": 8, "cpu": 1}
"""Sections of the slab that is timed."""
TIMED_S = {"cuda": 0.4, "cpu": 0.0}
"""Seconds for which it is repeated, once at least."""
MIN_S = 1e-6
"""Encoding takes at least so long; it is a difference of two times, which may come out below."""


def matrix_tflops(on: torch.device, precision: str) -> float:
    """TFLOP/s of a product of two large square matrices, the best of several."""
    device.fix_rounding(on, precision)
    n = MATRIX[on.type]
    factors = (
        torch.rand(2, n, n, generator=torch.Generator(on).manual_seed(1), device=on).sub_(0.5).to(TYPES[precision])
    )
    with torch.inference_mode():
        times = [_seconds(lambda: factors[0] @ factors[1], on) for _ in range(6)]
    return 2 * n**3 / min(times) / 1e12


@functools.cache
def operations(name: str, preset: str | None, scale: int, tile: int, halo: int, window: int) -> float:
    """Operations of one section encoded and one window fused, a multiplication and an addition being two. They are
    counted by torch, on tensors without memory.
    """
    with torch.device("meta"):
        network = models.build(name, scale, preset).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        state = network.encode_section(torch.empty(1, 1, tile, tile, device="meta"))  # type: ignore[operator]
        network.fuse_window([state] * window, halo)  # type: ignore[operator]
    return float(counter.get_total_flops())


def spec_operations(spec: NetworkSpec) -> float:
    """The same for one tile of a network."""
    return operations(spec.name, spec.preset, spec.scale, spec.lattice.tile, spec.lattice.halo, spec.lattice.window)


def one_window(network: Network) -> Window:
    """One cell's window of sections through the network, to compare precisions by."""
    lr, _ = strip(network.spec, 1, 1)
    return run_window(network, lr, network.spec.lattice.halo)


def measure(network: Network, tflops: float, window: Window, float32: Window) -> RateFound:
    """A slab of as many tiles as a batch has, timed with `super_resolve`. `tflops` is what a matrix product reaches,
    `window` and `float32` are `one_window` of this network and of it in float32.

    Raises DataError where the network makes values that are no numbers, TooLargeError.
    """
    spec, on = network.spec, network.device
    tiles, depth, halo = spec.batch, SECTIONS[on.type], spec.lattice.window - 1
    lr, slab = strip(spec, 1, tiles, depth)
    caches: SectionCaches = {}

    def run(first: int, step: int) -> None:
        super_resolve(network, lr, [first + step * z for z in range(depth + halo)], slab, caches)

    held = torch.cuda.memory_allocated(on) if on.type == "cuda" else 0
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    # Sections of one number are encoded once. So the first call encodes one section, the others none.
    first_s = _seconds(lambda: run(0, 0), on)
    fused_s = _median_s(lambda: run(0, 0), on)
    both_s = first_s
    if on.type == "cuda":  # where first calls are no measure: go on in z, so that each section is new once
        slabs = itertools.count(1)
        run(depth * next(slabs), 1)
        both_s = _median_s(lambda: run(depth * next(slabs), 1), on)
    fuse, both = fused_s / tiles / depth, both_s / tiles / depth
    rate = spec_operations(spec) / both / 1e12
    return RateFound(
        spec.name,
        spec.preset,
        spec.scale,
        spec.lattice.cell,
        spec.lattice.halo,
        spec.precision,
        tiles,
        encode_ms=1e3 * max(MIN_S, both - fuse),
        fuse_ms=1e3 * fuse,
        sr_voxels_per_s=(spec.lattice.cell * spec.scale) ** 2 / both,
        tflops=rate,
        share=rate / tflops,
        psnr_db=window.psnr_db(float32),
        indices_changed=window.changed(float32),
        peak_bytes=torch.cuda.max_memory_allocated(on) - held if on.type == "cuda" else None,
        formula_bytes=needed_bytes(spec, slab.lr, on.type == "cuda"),
    )


def _median_s(work: Callable[[], object], on: torch.device) -> float:
    end, times = time.perf_counter() + TIMED_S[on.type], [_seconds(work, on)]
    while time.perf_counter() < end:
        times.append(_seconds(work, on))
    return statistics.median(times)


def _seconds(work: Callable[[], object], on: torch.device) -> float:
    """Seconds on a GPU until all is done; on a CPU, where one thread computes, those that it was given."""
    if on.type == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize(on)
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(on)
    return time.perf_counter() - began
