"""The place where a target is to be written: empty, or begun by an earlier run of the same plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline import __version__
from pipeline.base.errors import LedgerError, TargetError
from pipeline.config import urls
from pipeline.prepare import fills, stored_plan
from pipeline.prepare.prepared import Prepared
from pipeline.prepare.specification import differences, digest
from pipeline.storage import ledger
from pipeline.storage.kv import Store
from pipeline.storage.targets.open import is_empty, open_target, stored_name, stored_provenance


@dataclass(frozen=True)
class Begun:
    """What the run that began a target has recorded: its specification, fills that were stated later (prepare/fills),
    and the volume's name.
    """

    spec: dict[str, Any]
    later: dict[str, Any]
    name: str


def check_place(prepared: Prepared) -> bool:
    """True where an earlier run of the same plan is to be resumed, False where the place is empty. Writes nothing.

    Raises LedgerError where another plan's target stands there, TargetError where anything else does.
    """
    if not _is_begun(prepared):
        check_vacant(prepared.job.target.url, prepared.store)
        return False
    open_target(prepared.job.target).refuse_foreign()
    return True


def check_begun(prepared: Prepared) -> None:
    """Raises LedgerError unless an earlier run of the same plan has begun this target."""
    if not _is_begun(prepared):
        raise nothing_run(prepared.job.target.url)


def nothing_run(target_url: str) -> LedgerError:
    """The error of a command that needs a target which no run has begun."""
    return LedgerError(f"nothing was run for {target_url} yet", "a target with its ledger", "Run emsr run first")


def check_vacant(target_url: str, store: Store) -> None:
    """Raises TargetError where anything is stored at the target's place; `store` is the sidecar."""
    if not is_empty(target_url):
        raise TargetError(
            f"{target_url} holds something that emsr did not plan (there is no {store.url}/{stored_plan.KEY})",
            "an empty place for the target",
            "Choose another target.url; nothing is ever deleted or overwritten",
        )


def claim(prepared: Prepared) -> None:
    """Write plan.json, then the target's metadata: the same bytes again on a resume. The place has been checked."""
    stored_plan.write(prepared)
    open_target(prepared.job.target).create()


def sweep(prepared: Prepared) -> None:
    """Remove what killed processes have left half written in target and sidecar."""
    for store in (Store(prepared.job.target.url), prepared.store):
        store.sweep()


def damaged_objects(prepared: Prepared) -> dict[str, str]:
    """What is wrong with plan.json and the target's metadata, by key: `claim` mends it.

    Metadata name the version of emsr that wrote them, and fills that a run went on with, as plan.json does.
    """
    store, target = prepared.store, prepared.job.target
    found = {}
    stored = stored_plan.read_whole(store)
    if stored is None:
        found[stored_plan.KEY] = "is missing" if store.get(stored_plan.KEY) is None else "is damaged"
    stated = stored_provenance(target.url, target.format) or {}
    version = stored.emsr if stored is not None and stored.emsr else stated.get("emsr", __version__)
    later = stored.later if stored is not None else stated.get(fills.KEY, {})
    provenance = {key: value for key, value in target.provenance.items() if key != fills.KEY} | {"emsr": version}
    provenance |= {fills.KEY: later} if later else {}
    return found | open_target(replace(target, provenance=provenance)).damaged_metadata()


def recorded_begin(store: Store, target_url: str, kind: str) -> Begun | None:
    """What is recorded of the target that stands there, by plan.json or, where that is lost, by its provenance."""
    if (stored := stored_plan.read_whole(store)) is not None:
        return Begun(stored.spec, stored.later, stored.name)
    theirs = stored_provenance(target_url, kind) if has_begun(store) else None
    if theirs is None:
        return None
    spec = {key: value for key, value in theirs.items() if key not in ("emsr", "digest", fills.KEY)}
    if theirs.get("digest") != digest(spec):
        return None
    name = stored_name(target_url, kind) or urls.volume_name(target_url)
    return Begun(spec, theirs.get(fills.KEY, {}), name)


def has_begun(store: Store) -> bool:
    """Whether any run has left a plan, be it damaged, or a ledger."""
    return store.get(stored_plan.KEY) is not None or bool(_ledgers(store))


def lost_plan(store: Store) -> LedgerError:
    """The error of a command that needs what plan.json said, where nothing else says it."""
    return LedgerError(
        f"{store.url}/{stored_plan.KEY} and the target's provenance are missing or damaged, "
        "and with them which sections are bad",
        "either of them",
        "Restore one, or run emsr run, which looks at the sections again",
    )


def _is_begun(prepared: Prepared) -> bool:
    """Whether an earlier run has begun this very plan. Raises LedgerError where it was another plan's.

    Where plan.json is lost, the ledger's folder names the plan; where no ledger was begun either, the provenance does.
    """
    job, store = prepared.job, prepared.store
    stored = stored_plan.read_whole(store)
    if stored is not None:
        if stored.digest != job.digest or not _goes_on_with(prepared, stored.later):
            theirs, ours = fills.as_it_is(stored.spec, stored.later), fills.as_it_is(prepared.spec, prepared.later)
            raise LedgerError(
                f"the target was begun with another plan: {differences(theirs, ours)}",
                "the same plan",
                "Restore the earlier volume.yaml to resume it (keys of network that may be absent can be left out), or "
                "choose another target.url",
            )
        return True
    ledgers = _ledgers(store)
    provenance = stored_provenance(job.target.url, job.target.format) or {}
    if ledger.folder(job.digest) in ledgers and _goes_on_with(prepared, provenance.get(fills.KEY, {})):
        return True
    damaged = store.get(stored_plan.KEY) is not None
    if not ledgers and damaged and provenance.get("digest") == job.target.provenance["digest"]:
        return True
    if is_empty(job.target.url) or (not ledgers and not damaged):
        return False
    raise LedgerError(
        f"{store.url}/{stored_plan.KEY} is {'damaged' if damaged else 'missing'}, and what else is there "
        f"({', '.join(ledgers) or 'no ledger'}) is not of this plan, {job.digest[:16]}",
        "the plan of the target that stands there",
        "Restore plan.json or the volume.yaml of the first run, which names the plan; what that one does not state of "
        "network.precision, batch, cell and halo is in the line `network` of its run; a fill that was stated later can "
        "be stated again afterwards",
    )


def _goes_on_with(prepared: Prepared, later: dict[str, Any]) -> bool:
    """Whether volume.yaml states the fills that an earlier run went on with."""
    return prepared.later == prepared.later | later


def _ledgers(store: Store) -> list[str]:
    """The folders of all ledgers beside a target."""
    return sorted({key.partition("/")[0] + "/" for key in store.keys(ledger.folder())})
