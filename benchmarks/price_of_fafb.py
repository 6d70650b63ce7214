"""Prints what FAFB would cost in requests, bytes, hours and storage, from the plan and the compression of real EM.

    python benchmarks/price_of_fafb.py RAW.tif [MORE.tif ...]

The files are real EM, uint8 (z, y, x), at least 8 sections of 128 x 128 voxels. The result is taken to be as hard to
compress as the first, which should be ssTEM at about 4 nm. A second table shows how the others compress, and the first
one reduced and enlarged again, which has as little grain as an interpolation's result. Everything is for the tissue
only (fafb.TISSUE of the bounding box). docs/price-of-fafb.md holds what this prints.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from parts import fafb
from PIL import Image

from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import TargetConfig
from pipeline.plan.plan import Plan
from pipeline.plan.price import input_voxels
from pipeline.plan.target_spec import TargetSpec
from pipeline.prepare import layout
from pipeline.storage.targets.open import open_target
from pipeline.worker.pyramid import halve

TARGETS = {
    "OME-Zarr, blosc-zstd": TargetConfig(url="x"),
    "precomputed jpeg": TargetConfig(url="x", format="precomputed", encoding="jpeg"),
}


def shares(hr: np.ndarray, target: TargetConfig) -> list[float]:
    """Stored over raw bytes of each level of `hr`, encoded by the target's own code."""
    shape = ZYX.of(hr.shape)
    chosen = layout.choose(
        ZYX(shape.z, shape.y // 8, shape.x // 8), 8, target.model_copy(update={"fidelity": False}), None
    )
    with tempfile.TemporaryDirectory() as folder:
        encoding = target.encoding or "blosc-zstd"
        spec = TargetSpec(f"file://{folder}/t", target.format, encoding, 8, (40, 4, 4), (0, 0, 0), chosen.levels, None)
        opened, found = open_target(spec), []
        for k, level in enumerate(chosen.levels):
            objects = opened.encode(k, Box(ZYX(0, 0, 0), level.shape), hr)
            found.append(sum(map(len, objects.values())) / hr.size)
            hr = halve(hr)
    return found


def second_pass(plan: Plan) -> tuple[int, int, int]:
    """(tasks, chunks read, objects put) of the levels that are averaged from stored ones."""
    read = put = 0
    for k in plan.second_pass:
        finer, level = plan.levels[k - 1], plan.levels[k]
        read += finer.shape.ceil_div(finer.chunk).product
        put += level.shape.ceil_div(level.shard).product
    return plan.tasks - plan.slabs, read, put


def rows(scale: int, name: str, hr: np.ndarray) -> Iterator[tuple[str, str]]:
    target = TARGETS[name]
    plan = fafb.plan_of(scale, target)
    slabs = plan.slabs * fafb.TISSUE
    share = shares(hr, target)
    read = input_voxels(plan, fafb.SOURCE_CHUNK)
    _, later_reads, later_puts = second_pass(plan)
    stored = [level.shape.product * fafb.TISSUE * share[min(k, len(share) - 1)] for k, level in enumerate(plan.levels)]
    fidelity = plan.fidelity.shape.product * fafb.TISSUE if plan.fidelity else 0
    flop = fafb.slab_flop(plan) * slabs
    yield "source", f"{plan.region.shape} at {4 * scale} nm"
    yield "slabs, of which tissue", f"{plan.slabs / 1e6:.2f} M, {slabs / 1e6:.2f} M"
    yield "read, without halo", f"{read.owned * fafb.TISSUE / 1e12:.2f} TB"
    yield "read, with halo", f"x{read.requested / read.owned:.2f}"
    yield "read, whole chunks, nothing cached", f"x{read.decoded / read.owned:.2f}"
    yield "GET of the source", f"{read.decoded / fafb.SOURCE_CHUNK.product * fafb.TISSUE / 1e6:.1f} M"
    yield "PUT by slabs", f"{fafb.puts_per_slab(plan) * slabs / 1e6:.1f} M"
    yield "second pass: GET, PUT", f"{later_reads * fafb.TISSUE / 1e6:.1f} M, {later_puts * fafb.TISSUE / 1e6:.1f} M"
    yield "stored over raw, mip 0, coarser", ", ".join(f"{s:.2f}" for s in share[:2])
    yield (
        "stored: mip 0, all, fidelity at most",
        f"{stored[0] / 1e12:.0f}, {sum(stored) / 1e12:.0f}, {fidelity / 1e12:.1f} TB",
    )
    yield "floating-point operations", f"{flop:.2e}"
    for cell in (64, 128):
        on_cells = fafb.plan_of(scale, target, cell)
        for precision, fit in fafb.h100_fits(on_cells).items():
            hours = fafb.h100_slab_seconds(on_cells, precision) * slabs / 3600
            scaled = "" if fit.scaled == 1 else f" (by voxels of tile {fit.rate.tile})"
            yield f"H100-hours, {precision}, cell {cell}", f"{hours:,.0f}{scaled}"
    yield "hours of a CPU core at 54 GFLOP/s", f"{flop / (fafb.CPU_CORE_TFLOPS * 1e12) / 3600:,.0f}"


def read(path: str) -> np.ndarray:
    """Reads a TIFF stack, cut to whole chunks of 8 in z and to multiples of 16 in y and x."""
    hr = tifffile.imread(path)
    return np.ascontiguousarray(hr[: len(hr) // 8 * 8, : hr.shape[1] // 16 * 16, : hr.shape[2] // 16 * 16])


def without_grain(hr: np.ndarray, scale: int) -> np.ndarray:
    size = (hr.shape[2], hr.shape[1])
    small = [
        Image.fromarray(section).resize((size[0] // scale, size[1] // scale), Image.Resampling.BICUBIC)
        for section in hr
    ]
    return np.stack([np.asarray(section.resize(size, Image.Resampling.BICUBIC)) for section in small])


def main(paths: list[str]) -> None:
    hr = read(paths[0])
    columns = [dict(rows(scale, name, hr)) for scale in (8, 16) for name in TARGETS]
    print("| | " + " | ".join(f"x{scale}, {name}" for scale in (8, 16) for name in TARGETS) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for label in columns[0]:
        print(f"| {label} | " + " | ".join(column[label] for column in columns) + " |")
    volumes = {Path(path).parent.name: read(path) for path in paths}
    volumes |= {f"{Path(paths[0]).parent.name} by x{scale} and back": without_grain(hr, scale) for scale in (8, 16)}
    print("\n| stored over raw, mip 0 | " + " | ".join(TARGETS) + " |")
    print("|---" * (len(TARGETS) + 1) + "|")
    for label, volume in volumes.items():
        print(f"| {label} | " + " | ".join(f"{shares(volume, target)[0]:.2f}" for target in TARGETS.values()) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
