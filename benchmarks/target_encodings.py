"""Measures what each encoding of targets takes and costs: stored over raw bytes, and MB per CPU second both ways.

    python benchmarks/target_encodings.py RAW.tif builtin [side=128] [repeats=3]

RAW.tif is real EM, uint8 (z, y, x): 8 of its sections, 8 times `side` voxels wide, are reduced eightfold as the paper
does and super-resolved by these weights, and by bicubic. Mip 0 is then encoded and decoded by each target's own code,
in chunks of 8 x 256 x 256. CPU seconds are those of the whole process, libraries' threads included; the best of the
repeats counts. The last two columns are stored bytes and CPU seconds over those of blosc-zstd.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tifffile
import zarr
from parts.tissue_job import ready
from PIL import Image

from pipeline.base.geometry import ZYX, Box
from pipeline.inference.tiles import super_resolve
from pipeline.plan.target_spec import LevelSpec, TargetSpec
from pipeline.storage.targets.open import open_target
from pipeline.storage.volume import Uint8Array
from pipeline.worker.open_job import open_job
from pipeline.worker.slab import read_with_halo

SECTIONS, SCALE = 8, 8
CHUNK = ZYX(8, 256, 256)
ENCODINGS = (
    ("ome-zarr", "blosc-zstd"),
    ("ome-zarr", "zstd"),
    ("ome-zarr", "raw"),
    ("precomputed", "jxl"),
    ("precomputed", "png"),
    ("precomputed", "jpeg"),
)
T = TypeVar("T")


def reduced(path: Path, side: int) -> Uint8Array:
    """The middle of the volume's first sections, eightfold smaller: antialiased bicubic, a section at a time."""
    volume = tifffile.imread(path)[:SECTIONS]
    y, x = ((n - SCALE * side) // 2 for n in volume.shape[1:])
    crop = volume[:, y : y + SCALE * side, x : x + SCALE * side]
    return np.stack([np.asarray(Image.fromarray(s).resize((side, side), Image.Resampling.BICUBIC)) for s in crop])


def enlarged(folder: Path, lr: Uint8Array, name: str, network: dict[str, Any]) -> Uint8Array:
    """What a network makes of the whole of `lr` as one slab."""
    array = zarr.create_array(folder / f"{name}-lr", shape=lr.shape, chunks=lr.shape, dtype="uint8")
    array[:] = lr
    _, side, _ = lr.shape
    opened = open_job(ready(folder, folder / f"{name}-lr", name, (SECTIONS, side, side), network).job)
    slab = opened.plan.slab(0)
    voxels, sections = read_with_halo(opened, slab)
    return super_resolve(opened.network, voxels, sections, slab)


def best(call: Callable[[], T], repeats: int) -> tuple[T, float]:
    """The result, and CPU seconds."""
    seconds = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        result = call()
        seconds = min(seconds, time.process_time() - began)
    return result, seconds


def main(raw: str, weights: str, side: int = 128, repeats: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lr = reduced(Path(raw), side)
        outputs = {
            "gpemsr": enlarged(folder, lr, "gpemsr", {"name": "gpemsr", "weights": weights}),
            "bicubic": enlarged(folder, lr, "bicubic", {"name": "bicubic"}),
        }
        print("| network | encoding | stored over raw | MB per CPU s: encoded | decoded | stored, relative | CPU |")
        print("|---|---|---|---|---|---|---|")
        for network, sr in outputs.items():
            shape = ZYX.of(sr.shape)
            first: tuple[float, float] | None = None
            for form, encoding in ENCODINGS:
                url = (folder / f"{network}-{encoding}").as_uri()
                levels = (LevelSpec(shape, CHUNK, CHUNK),)
                target = open_target(TargetSpec(url, form, encoding, SCALE, (40, 4, 4), (0, 0, 0), levels, None))
                target.create()
                box = Box(ZYX(0, 0, 0), shape)
                objects, spent = best(lambda: target.encode(0, box, sr), repeats)  # noqa: B023 - called at once
                target.put(objects)
                read, reading = best(lambda: open_target(target.spec).read(0, box), repeats)  # noqa: B023
                if encoding != "jpeg" and not np.array_equal(read, sr):
                    raise SystemExit(f"{encoding} gave other voxels back")
                stored = sum(map(len, objects.values())) / sr.size
                first = first or (stored, spent)
                rates = f"{sr.size / spent / 1e6:,.0f} | {sr.size / reading / 1e6:,.0f}"
                over = f"{stored / first[0]:.2f} | {spent / first[1]:.1f}"
                print(f"| {network} | {encoding} | {stored:.2f} | {rates} | {over} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
