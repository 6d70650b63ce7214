"""Measures the main job against `dask.array`: from_zarr -> map_overlap -> to_zarr, as one would write it first.

    python benchmarks/map_overlap.py [slabs=256] [side=64] [repeats=2]

Both have the same source, sleeping network (20 ms a slab) behind a per-process lock, workers, threads, codec and
chunks. They run in turn, each on a fresh cluster of two workers. Printed are wall seconds, the scheduler's CPU per
slab, and by how much the peak of the worker that grew most exceeds its size before; then the ratios.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import numpy as np
import zarr
from distributed import Client
from parts import sleeping
from parts.dask_processes import apart, usage, worker_memory
from parts.tissue_job import drive_all, ready, write_source

SCALE = 8
CODEC = zarr.codecs.BloscCodec(typesize=1, cname="zstd", clevel=1, shuffle="bitshuffle")


def naive(client: Client, source: Path, target: Path, slab: tuple[int, int, int]) -> None:
    import dask.array as da

    volume = da.from_zarr(str(source))
    like = np.empty((0, 0, 0), "uint8")
    up = da.map_overlap(
        sleeping.whole_slab,
        volume,
        depth=sleeping.HALO,
        boundary="nearest",
        trim=False,
        chunks=_up(volume.chunks),
        meta=like,
    )
    shape = tuple(n * f for n, f in zip(volume.shape, (1, SCALE, SCALE), strict=True))
    chunks = (slab[0], slab[1] * SCALE, slab[2] * SCALE)
    array = zarr.create_array(target, shape=shape, chunks=chunks, dtype="uint8", compressors=CODEC)
    with dask.config.set(scheduler=client):
        up.to_zarr(array)


def _up(chunks: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    z, y, x = chunks
    return (z, tuple(n * SCALE for n in y), tuple(n * SCALE for n in x))


def measure(slabs: int, side: int, repeats: int) -> dict[str, float]:
    depth = sleeping.DEPTH
    os.environ["SLEEPING_S"] = "0.02"
    slab = (depth, side, side)
    rows: dict[str, list[dict[str, float]]] = {"naive": [], "emsr": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        across = 2
        source = write_source(folder / "lr", (slabs // across**2 * depth, across * side, across * side), slab)
        few = write_source(folder / "few", slab, slab)
        for repeat in range(repeats):
            for way, found in rows.items():
                with apart(2, preload="parts.sleeping") as client:
                    shard = {
                        "chunk_shape": [depth, side * SCALE, side * SCALE],
                        "shard_shape": [depth, side * SCALE, side * SCALE],
                    }
                    keys: dict[str, Any] = {"fidelity": False, "mips": 1, **shard}
                    network = {"name": "nearest", "cell": side, "halo": 8}
                    if way == "emsr":
                        drive_all(client, ready(folder, few, f"warm{repeat}", slab, network, 2, **keys))
                    else:
                        naive(client, few, folder / f"warm-naive{repeat}", slab)
                    cpu, before = usage(client), worker_memory(client)
                    began = time.perf_counter()
                    if way == "emsr":
                        drive_all(client, ready(folder, source, f"emsr{repeat}", slab, network, 2, **keys))
                    else:
                        naive(client, source, folder / f"naive{repeat}", slab)
                    wall = time.perf_counter() - began
                    after_cpu, after = usage(client), worker_memory(client)
                    found.append(
                        {
                            "wall_s": wall,
                            "scheduler_cpu_ms_per_slab": 1e3
                            * (after_cpu["scheduler"][0] - cpu["scheduler"][0])
                            / slabs,
                            "client_cpu_ms_per_slab": 1e3 * (after_cpu["client"][0] - cpu["client"][0]) / slabs,
                            "worker_peak_mb": max(after[w][1] - before[w][0] for w in after) / 1e6,
                        }
                    )
                    print(way, {key: round(value, 2) for key, value in found[-1].items()}, flush=True)
        first, second = (
            np.asarray(zarr.open_array(folder / p, mode="r")[depth : 2 * depth]) for p in ("naive0", "emsr0/0")
        )
        assert (first == second).all()
    ratios = {
        key: statistics.median(r[key] for r in rows["naive"]) / statistics.median(r[key] for r in rows["emsr"])
        for key in rows["naive"][0]
    }
    print("naive over emsr", {key: round(value, 1) for key, value in ratios.items()})
    return ratios


if __name__ == "__main__":
    measure(*([int(a) for a in sys.argv[1:]] + [256, 64, 2][len(sys.argv) - 1 :]))
