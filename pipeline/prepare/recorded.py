"""What lies beside a target, by itself: its plan and its ledger, read without source, network or cluster."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.base.geometry import ZYX, Box
from pipeline.config import urls
from pipeline.plan.lattice import Lattice
from pipeline.plan.plan import Plan
from pipeline.plan.target_spec import LevelSpec
from pipeline.prepare.place import PLAN, damaged_plan_errors
from pipeline.sections import bad_sections
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger


@dataclass(frozen=True)
class Recorded:
    """`bad_sections` has a line for each, `left_empty` those whose output is left empty, counted from the target's
    first. `plan` is good for which task is which box, not for what it reads."""

    digest: str
    slabs: int
    plan: Plan
    bad_sections: list[str]
    ledger: Ledger
    store: Store
    left_empty: frozenset[int] = frozenset()


def read(target_url: str, reader: str) -> Recorded | None:
    """What lies beside this target; None where nothing was run for it yet. `reader` would sign what is written.

    Raises LedgerError where its plan is damaged.
    """
    store = Store(urls.sidecar(target_url))
    stored = store.get(PLAN)
    if stored is None:
        return None
    with damaged_plan_errors(store.url):
        body = json.loads(stored)
        ledger = Ledger(store, str(body["digest"]), int(body["tasks"]), reader)
        source = body["spec"]["source"]
        bad = bad_sections.describe(source["bad_sections"])
        empty = bad_sections.left_empty(source["bad_sections"], int(source["region"]["start"][0]))
        recorded = Recorded(str(body["digest"]), int(body["slabs"]), planned(body["spec"]), bad, ledger, store, empty)
    ledger.load()
    return recorded


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
