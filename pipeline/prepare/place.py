"""The place where a target is to be written: empty, or begun by an earlier run of the same plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline import __version__
from pipeline.base.errors import LedgerError, TargetError
from pipeline.prepare import stored_plan
from pipeline.prepare.prepared import Prepared
from pipeline.prepare.specification import differences, digest
from pipeline.storage import ledger
from pipeline.storage.kv import Store
from pipeline.storage.targets.open import is_empty, open_target, stored_provenance


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

    Metadata name the version of emsr that wrote them, as plan.json does.
    """
    store, target = prepared.store, prepared.job.target
    found = {}
    stored = stored_plan.read_whole(store)
    if stored is None:
        found[stored_plan.KEY] = "is missing" if store.get(stored_plan.KEY) is None else "is damaged"
    stated = (stored_provenance(target.url, target.format) or {}).get("emsr", __version__)
    version = stored.emsr if stored is not None and stored.emsr else stated
    return found | open_target(replace(target, provenance=target.provenance | {"emsr": version})).damaged_metadata()


def recorded_spec(store: Store, target_url: str, kind: str) -> dict[str, Any] | None:
    """The specification of the target that stands there, by plan.json or, where that is lost, by its provenance."""
    if (stored := stored_plan.read_whole(store)) is not None:
        return stored.spec
    theirs = stored_provenance(target_url, kind) if has_begun(store) else None
    spec = {key: value for key, value in (theirs or {}).items() if key not in ("emsr", "digest")}
    return spec if theirs is not None and theirs.get("digest") == digest(spec) else None


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
        if stored.digest != job.digest:
            raise LedgerError(
                f"the target was begun with another plan: {differences(stored.spec, prepared.spec)}",
                "the same plan",
                "Restore the earlier volume.yaml to resume it (keys of network that may be absent can be left out), or "
                "choose another target.url",
            )
        return True
    ledgers = _ledgers(store)
    if ledger.folder(job.digest) in ledgers:
        return True
    provenance = stored_provenance(job.target.url, job.target.format) or {}
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
        "network.precision, batch, cell and halo is in the line `network` of its run",
    )


def _ledgers(store: Store) -> list[str]:
    """The folders of all ledgers beside a target."""
    return sorted({key.partition("/")[0] + "/" for key in store.keys(ledger.folder())})
