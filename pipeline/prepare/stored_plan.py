"""plan.json, which says what the target beside it is: read, checked against its own digest, written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline import __version__
from pipeline.base.errors import LedgerError
from pipeline.base.geometry import ZYX, Box
from pipeline.plan.lattice import Lattice
from pipeline.plan.plan import Plan
from pipeline.plan.target_spec import LevelSpec
from pipeline.prepare import fills
from pipeline.prepare.prepared import Prepared
from pipeline.prepare.specification import digest
from pipeline.storage.kv import Store

KEY = "plan.json"
_EARLIER_NAME = "emsr"
"""The name of every volume whose plan.json is from before it was kept."""


@dataclass(frozen=True)
class StoredPlan:
    """`plan` is good for which task is which box, not for what it reads. `emsr` is the version that wrote the target's
    metadata last, "" where plan.json is from before that was kept. `name` is the volume's in the target, `later` the
    fills that were stated after it was begun.
    """

    digest: str
    spec: dict[str, Any]
    plan: Plan
    emsr: str
    name: str
    later: dict[str, Any]


def read(store: Store) -> StoredPlan | None:
    """The plan beside a target; None where there is none. Raises LedgerError where it is damaged."""
    value = store.get(KEY)
    if value is None:
        return None
    try:
        body = json.loads(value)
        spec, later = dict(body["spec"]), dict(body.get(fills.KEY, {}))
        named = str(body.get("emsr", "")), str(body.get("name", _EARLIER_NAME))
        found = StoredPlan(str(body["digest"]), spec, planned(spec), *named, later)
        counts = (body["slabs"], body["tasks"])
        if found.digest != digest(found.spec) or counts != (found.plan.slabs, found.plan.tasks):
            raise ValueError
        if later and body["digest_now"] != digest(fills.as_it_is(spec, later)):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LedgerError(
            f"{store.url}/{KEY} is damaged",
            "the plan of an earlier run",
            "Run emsr run with the volume.yaml of the first run, which writes it again, or restore it",
        ) from None
    return found


def read_whole(store: Store) -> StoredPlan | None:
    """The same; None where it is damaged."""
    try:
        return read(store)
    except LedgerError:
        return None


def write(prepared: Prepared) -> None:
    """Write the plan, unless it is there as this version of emsr writes it."""
    stored, job, later = read_whole(prepared.store), prepared.job, prepared.later
    same = stored is not None and (stored.digest, stored.later) == (job.digest, later)
    if stored is not None and same and stored.emsr in ("", __version__):
        return
    body = {"emsr": __version__, "digest": job.digest, "slabs": job.plan.slabs, "tasks": job.plan.tasks}
    body |= {"name": job.target.name, "spec": prepared.spec}
    if later:
        body |= {fills.KEY: later, "digest_now": digest(fills.as_it_is(prepared.spec, later))}
    prepared.store.put(KEY, json.dumps(body, indent=1).encode())


def planned(spec: dict[str, Any]) -> Plan:
    """The plan with this specification.

    It tells which task is which box. The volume's bounds and bad sections are left out: read boxes differ. Raises
    KeyError, TypeError or ValueError where `spec` is no specification.
    """
    region = Box.of(spec["source"]["region"]["start"], spec["source"]["region"]["stop"])
    levels = tuple(
        LevelSpec(*(ZYX.of(level[k]) for k in ("shape", "chunk", "shard"))) for level in spec["target"]["levels"]
    )
    lossy = spec["target"]["encoding"] == "jpeg"
    return Plan(
        region,
        region,
        ZYX.of(spec["slab_shape"]),
        int(spec["network"]["scale"]),
        Lattice(**spec["lattice"]),
        levels,
        None,
        lossy=lossy,
    )
