"""What lies beside a target, by itself: its plan and its ledger, read without source, network or cluster."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import urls
from pipeline.plan.plan import Plan
from pipeline.prepare import stored_plan
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
    stored = stored_plan.read(store)
    if stored is None:
        return None
    ledger = Ledger(store, stored.digest, stored.plan.tasks, reader)
    source = stored.spec["source"]
    bad = bad_sections.describe(source["bad_sections"])
    empty = bad_sections.left_empty(source["bad_sections"], int(source["region"]["start"][0]))
    ledger.load()
    return Recorded(stored.digest, stored.plan.slabs, stored.plan, bad, ledger, store, empty)
