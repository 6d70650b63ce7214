"""Writes phantom tissue to disk, and prepares and drives the main job over it as `pipeline.run` does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr
from distributed import Client

from examples.make_phantom import phantom
from pipeline.config import volume as configuration
from pipeline.config.urls import sidecar
from pipeline.plan.receipt import QUARANTINED
from pipeline.prepare.place import claim
from pipeline.prepare.prepare import prepare
from pipeline.prepare.prepared import Prepared
from pipeline.schedule.execute import execute
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.worker.lease import process_lease

Shape = tuple[int, int, int]

PATCH = (4, 512, 512)
"""Shape of the phantom that is drawn. Larger volumes mirror it, smaller ones are cut from it."""


def tissue(shape: Shape) -> np.ndarray:
    """EM-like voxels, uint8, (z, y, x)."""
    patch = phantom(PATCH)
    return np.pad(patch, [(0, max(0, n - have)) for n, have in zip(shape, patch.shape, strict=True)], mode="symmetric")[
        tuple(slice(n) for n in shape)
    ]


def write_source(path: Path, shape: Shape, chunk: Shape) -> Path:
    """A zarr v3 array of tissue, written by zarr-python."""
    array = zarr.create_array(
        path,
        shape=shape,
        chunks=chunk,
        dtype="uint8",
        config={"write_empty_chunks": True},
        compressors=zarr.codecs.ZstdCodec(level=1),
    )
    array[:] = tissue(shape)
    return path


def ready(
    folder: Path, source: Path, name: str, slab: Shape, network: dict[str, Any], in_flight: int = 2, **target: Any
) -> Prepared:
    """Writes folder/name.yaml, prepares its job, claims the target. `target` and `network` are keys of volume.yaml."""
    body = {
        "source": {"url": str(source), "voxel_size_nm": [45, 32, 32]},
        "target": {"url": str(folder / name), **target},
        "network": {"scale": 8, **network},
        "work": {"slab_shape": list(slab), "in_flight": in_flight},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(body))
    prepared = prepare(configuration.load(path))
    claim(prepared)
    return prepared


@dataclass(frozen=True)
class Driven:
    totals: RunTotals
    wall_s: float


def drive_all(client: Client, prepared: Prepared) -> Driven:
    """Runs every slab of a new job through the real schedule and ledger. Raises RuntimeError where a slab failed."""
    job = prepared.job
    store = Store(sidecar(job.target.url))
    ledger = Ledger(store, job.digest, job.plan.tasks, "benchmark")
    ledger.load()
    began = time.perf_counter()
    run = RunState(job, ledger)
    execute(client, run, process_lease)
    wall = time.perf_counter() - began
    if run.totals.written != job.plan.tasks:
        error = next((ledger.why(i)[:500] for i in ledger.indices(QUARANTINED)), "")
        raise RuntimeError(f"{run.totals.quarantined} of {job.plan.tasks} tasks failed: {error}")
    return Driven(run.totals, wall)
