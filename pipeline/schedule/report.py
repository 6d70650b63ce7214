"""What is left beside the target after a run: report.json and a contact sheet."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import time
from typing import Any

from pipeline import __version__
from pipeline.base.errors import EmsrError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import Config
from pipeline.plan.price import memory_bytes, stored_share
from pipeline.prepare.prepare import Prepared
from pipeline.schedule.execute import Outcome
from pipeline.storage.kv import Store
from pipeline.storage.ledger import QUARANTINED, Ledger
from pipeline.storage.sources.open import open_source
from pipeline.storage.targets.open import open_target
from pipeline.storage.volume import FIDELITY
from pipeline.viewer.contact_sheet import contact_sheet

SHEET_SIDE = 512
FAILURES = 100
_LIBRARIES = ("torch", "dask", "distributed", "tensorstore", "zarr", "numcodecs", "cloud-volume", "numpy")


def write(
    config: Config, prepared: Prepared, store: Store, ledger: Ledger, outcome: Outcome, run_id: str, began: float
) -> str:
    """Writes both; returns the sheet's URL, or why there is none."""
    plan = prepared.job.plan
    wall = time.time() - began
    failures = [i for _, i in zip(range(FAILURES), ledger.indices(QUARANTINED), strict=False)]
    share = stored_share(plan, outcome.bytes, outcome.voxels)
    promise = memory_bytes(plan, config.work.in_flight, outcome.base_bytes, share, outcome.network)
    body: dict[str, Any] = {
        "run": run_id,
        "emsr": __version__,
        "digest": prepared.job.digest,
        "spec": prepared.spec,
        "work": config.work.model_dump(mode="json", exclude={"slab_shape", "budget"})
        | {"slab_shape": list(plan.slab_shape)},
        "cluster": {"kind": config.cluster.kind, "workers": config.cluster.workers},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "began": began,
        "wall_s": wall,
        "ledger": {"planned": ledger.tasks} | ledger.counts(),
        "this_run": {
            "written": outcome.written,
            "skipped": outcome.skipped,
            "quarantined": outcome.quarantined,
            "interrupted": outcome.interrupted,
        },
        "started_again": outcome.started_again,
        "requests": {"refused": outcome.troubles.refused, "retried": outcome.troubles.retried},
        "seconds": outcome.seconds,
        "voxels": outcome.voxels,
        "voxels_per_s": outcome.voxels / wall if wall else 0.0,
        "stored_bytes": outcome.bytes,
        "memory": {"promised": promise if outcome.base_bytes else None, "peak": outcome.peak_bytes},
        "workers": {name: dataclasses.asdict(tally) for name, tally in outcome.workers.items()},
        "bad_sections": prepared.spec["source"]["bad_sections"],
        "failures": [
            {"task": i, "lr_box": str(plan.slab(i).lr) if i < plan.slabs else None, "why": ledger.why(i).error}
            for i in failures
        ],
    }
    store.put("report.json", json.dumps(body, indent=1).encode())
    try:
        store.put("contact-sheet.png", _sheet(config, prepared))
    except EmsrError as error:
        return f"none ({error})"
    return f"{store.url}/contact-sheet.png"


def _sheet(config: Config, prepared: Prepared) -> bytes:
    """The middle of the first, middle and last quarter sections: LR beside SR."""
    plan = prepared.job.plan
    source, target = open_source(config.source), open_target(prepared.job.target)
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
