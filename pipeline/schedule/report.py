"""What a run leaves beside its target: report.json and a contact sheet."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import __version__
from pipeline.base.errors import EmsrError
from pipeline.base.geometry import ZYX, Box
from pipeline.cluster.connect import slabs_in_flight
from pipeline.plan.price import memory_bytes, stored_share
from pipeline.plan.receipt import QUARANTINED
from pipeline.plan.target_spec import FIDELITY
from pipeline.prepare.prepared import Prepared
from pipeline.schedule.run_state import RunState
from pipeline.storage.sources.open import open_source
from pipeline.storage.targets.open import open_target
from pipeline.viewer.contact_sheet import contact_sheet

SHEET_SIDE = 512
MAX_FAILURES = 100
_LIBRARIES = ("torch", "dask", "distributed", "tensorstore", "zarr", "numcodecs", "cloud-volume", "numpy")


def write(prepared: Prepared, run: RunState, crew: Sequence[Mapping[str, str]], lost: Sequence[str]) -> str:
    """Write both; returns the contact sheet's URL, or why there is none.

    `crew` is what has written this target, `lost` what was looked for in the end and is not as it was written.
    """
    plan, totals, ledger, work = prepared.job.plan, run.totals, run.ledger, prepared.config.work
    in_flight = slabs_in_flight(prepared.config)
    wall = time.time() - run.began
    failures = [i for _, i in zip(range(MAX_FAILURES), ledger.indices(QUARANTINED), strict=False)]
    share = stored_share(plan, totals.bytes, totals.voxels)
    promise = memory_bytes(plan, in_flight, totals.base_bytes, share, totals.network)
    body: dict[str, Any] = {
        "run": ledger.run_id,
        "emsr": __version__,
        "digest": prepared.job.digest,
        "spec": prepared.spec,
        "stated_later": prepared.later,
        "work": work.model_dump(mode="json", exclude={"budget"})
        | {"slab_shape": list(plan.slab_shape), "in_flight": in_flight},
        "cluster": {"kind": prepared.config.cluster.kind, "workers": prepared.config.cluster.workers},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES},
        "began": run.began,
        "wall_s": wall,
        "ledger": {"planned": ledger.tasks} | ledger.counts(),
        "this_run": {
            "written": totals.written,
            "skipped": totals.skipped,
            "quarantined": totals.quarantined,
            "interrupted": run.interrupted,
            "dropped_lines": totals.dropped_lines,
        },
        "started_again": totals.started_again,
        "requests": {"refused": totals.requests.refused, "retried": totals.requests.retried},
        "seconds": totals.seconds,
        "voxels": totals.voxels,
        "voxels_per_s": totals.voxels / wall if wall else 0.0,
        "stored_bytes": totals.bytes,
        "memory": {"promised": promise if totals.base_bytes else None, "peak": totals.peak_bytes},
        "workers": {name: dataclasses.asdict(did) for name, did in totals.workers.items()},
        "set_aside": totals.aside,
        "crew": list(crew),
        "computed": {
            "precision": prepared.job.network.precision,
            "batch": prepared.job.network.batch,
            "devices": sorted({entry["device"] for entry in crew}),
            "libraries": sorted({entry["libraries"] for entry in crew}),
            "notes": [f"{note} (first on {worker})" for note, worker in totals.notes.items()],
        },
        "looked_for_in_vain": list(lost),
        "bad_sections": prepared.spec["source"]["bad_sections"],
        "failures": [
            {"task": i, "lr_box": str(plan.slab(i).lr) if i < plan.slabs else None, "why": ledger.why(i).error}
            for i in failures
        ],
    }
    prepared.store.put("report.json", json.dumps(body, indent=1).encode())
    try:
        prepared.store.put("contact-sheet.png", _sheet(prepared))
    except EmsrError as error:
        return f"none ({error})"
    return f"{prepared.store.url}/contact-sheet.png"


def _version(name: str) -> str | None:
    """None where the library is not installed: the client needs few of them."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sheet(prepared: Prepared) -> bytes:
    """The middle of the first, middle and last quarter sections: LR beside SR."""
    plan = prepared.job.plan
    source, target = open_source(prepared.config.source), open_target(prepared.job.target)
    side = SHEET_SIDE // plan.scale
    shape = plan.region.shape
    size = ZYX(1, min(side, shape.y), min(side, shape.x))
    pairs, labels, errors = [], [], []
    for z in sorted({shape.z // 4, shape.z // 2, 3 * shape.z // 4}):
        start = ZYX(z, (shape.y - size.y) // 2, (shape.x - size.x) // 2)
        box = Box.at(start, size)
        good = plan.section(plan.region.start.z + z)
        here = box.shift(plan.region.start)
        lr = source.read(Box(ZYX(good, here.start.y, here.start.x), ZYX(good + 1, here.stop.y, here.stop.x)))
        pairs.append((lr[0], target.read(0, box.lateral(plan.scale), absent=0)[0]))
        labels.append(f"z {plan.region.start.z + z}")
        if plan.fidelity is not None:
            errors.append(target.read(FIDELITY, box, absent=0)[0])
    return contact_sheet(pairs, plan.scale, labels, errors)
