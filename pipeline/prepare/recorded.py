"""What lies beside a target, by itself: its plan and its ledger, read without source, network or cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import LedgerError
from pipeline.base.geometry import ZYX, Box
from pipeline.plan.plan import Lattice, LevelSpec, Plan
from pipeline.prepare.prepare import sidecar
from pipeline.sections import bad_sections
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger


@dataclass(frozen=True)
class Recorded:
    digest: str
    slabs: int
    plan: Plan
    bad_sections: list[str]
    """What there is to say of them."""
    ledger: Ledger
    store: Store


def read(target_url: str, reader: str) -> Recorded | None:
    """None where nothing was run for this target yet. LedgerError where its plan is damaged. `reader` would sign what is written."""
    store = Store(sidecar(target_url))
    stored = store.get("plan.json")
    if stored is None:
        return None
    try:
        body = json.loads(stored)
        ledger = Ledger(store, str(body["digest"]), int(body["tasks"]), reader)
        told = bad_sections.describe(body["spec"]["source"]["bad_sections"])
        found = Recorded(str(body["digest"]), int(body["slabs"]), planned(body["spec"]), told, ledger, store)
    except (ValueError, KeyError, TypeError):
        raise LedgerError(
            f"{store.url}/plan.json is damaged",
            "the plan of an earlier run",
            "Restore it, or choose another target.url",
        ) from None
    ledger.load()
    return found


def planned(spec: dict[str, Any]) -> Plan:
    """The plan with this specification, good for which task is which box. The volume's bounds and bad sections are left out: read boxes differ.

    Raises KeyError, TypeError or ValueError where it is no specification.
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
