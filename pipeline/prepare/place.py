"""The place where a target is to be written: empty, or begun by an earlier run of the same plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.base.errors import LedgerError, TargetError
from pipeline.prepare.prepared import Prepared
from pipeline.prepare.specification import differences
from pipeline.storage.kv import Store
from pipeline.storage.targets.open import is_empty, open_target

PLAN = "plan.json"


def check_place(prepared: Prepared) -> bool:
    """True where an earlier run of the same plan is to be resumed, False where the place is empty. Writes nothing.

    Raises LedgerError where another plan's target stands there, TargetError where anything else does.
    """
    stored = prepared.store.get(PLAN)
    if stored is not None:
        _check_plan(prepared, stored)
        return True
    check_vacant(prepared.job.target.url, prepared.store)
    return False


def check_begun(prepared: Prepared) -> None:
    """Raises LedgerError unless an earlier run of the same plan has begun this target."""
    stored = prepared.store.get(PLAN)
    if stored is None:
        raise nothing_run(prepared.job.target.url)
    _check_plan(prepared, stored)


def nothing_run(target_url: str) -> LedgerError:
    """The error of a command that needs a target which no run has begun."""
    return LedgerError(
        f"nothing was run for {target_url} yet", "a target with its ledger", "Run python -m pipeline.run first"
    )


def check_vacant(target_url: str, store: Store) -> None:
    """Raises TargetError where anything is stored at the target's place; `store` is the sidecar."""
    if not is_empty(target_url):
        raise TargetError(
            f"{target_url} holds something that emsr did not plan (there is no {store.url}/{PLAN})",
            "an empty place for the target",
            "Choose another target.url; nothing is ever deleted or overwritten",
        )


def claim(prepared: Prepared) -> None:
    """Write plan.json, then the target's metadata: the same bytes again on a resume. The place has been checked."""
    if prepared.store.get(PLAN) is None:
        plan = prepared.job.plan
        body = {"digest": prepared.job.digest, "slabs": plan.slabs, "tasks": plan.tasks, "spec": prepared.spec}
        prepared.store.put(PLAN, json.dumps(body, indent=1).encode())
    open_target(prepared.job.target).create()


def _check_plan(prepared: Prepared, stored: bytes) -> None:
    """LedgerError, saying where the two specifications differ, unless `stored` is this plan's plan.json."""
    with damaged_plan_errors(prepared.store.url):
        theirs = json.loads(stored)
        their_digest, their_spec = theirs["digest"], dict(theirs["spec"])
    if their_digest != prepared.job.digest:
        raise LedgerError(
            f"the target was begun with another plan: {differences(their_spec, prepared.spec)}",
            "the same plan",
            "Restore the earlier volume.yaml to resume it, or choose another target.url",
        )


@contextmanager
def damaged_plan_errors(where: str) -> Iterator[None]:
    """What reading a damaged plan.json raises becomes a LedgerError; `where` is the sidecar's URL."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RecursionError):
        raise LedgerError(
            f"{where}/{PLAN} is damaged", "the plan of an earlier run", "Restore it, or choose another target.url"
        ) from None
