"""From volume.yaml to a job: open what is there, fill in defaults, refuse contradictions. Touches nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline import __version__
from pipeline.base.errors import LedgerError, SourceError, TargetError, TransientError
from pipeline.base.geometry import Box
from pipeline.config import urls
from pipeline.config.volume import Config, FillConfig
from pipeline.inference.network import NetworkSpec, describe
from pipeline.plan.plan import Plan
from pipeline.plan.price import output_voxels
from pipeline.prepare import layout
from pipeline.sections import bad_sections
from pipeline.sections.bad_sections import Detect
from pipeline.sections.survey import Survey, survey
from pipeline.storage.kv import Store
from pipeline.storage.requests import Rates
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.targets.open import is_empty, open_target
from pipeline.storage.volume import Source, TargetSpec, VolumeInfo
from pipeline.worker.slab import Job

FORMAT_VERSION = 1
"""Raised whenever the same volume.yaml would give other bytes: it is part of the digest."""


@dataclass(frozen=True)
class Prepared:
    job: Job
    source: VolumeInfo
    spec: dict[str, Any]
    """What `digest` is the digest of, as plain JSON: shown when two plans differ."""


def sidecar(target_url: str) -> str:
    """The folder of ledger, lease and reports: beside the target, so that the target holds nothing but the volume."""
    return urls.split_format(target_url)[1] + ".emsr"


def prepare(config: Config, look: Detect | None = None) -> Prepared:
    """Opens the source's metadata and plans. Raises UserError; writes nothing.

    With source.bad_sections.detect, what an earlier run found counts, so that every command sees one plan; `look` is called
    where there was none, after everything else was found to be right.
    """
    network = describe(config.network)
    target_url = _target_url(config)
    try:
        source = open_source(config.source)
        info = source.info
        mask = open_mask(config.source.mask, info).info if config.source.mask is not None else None
    except TransientError as error:
        raise SourceError(f"the source cannot be reached: {error}", "", "Check the url and the network") from None
    region = _region(config, info)
    bad = bad_sections.listed(config.source.bad_sections, info)
    shapes = layout.choose(region.shape, network.scale, config.target, config.work.slab_shape)
    encoding = config.target.encoding or {"ome-zarr": "blosc-zstd", "precomputed": "raw"}[config.target.format]
    lossy = encoding == "jpeg"
    empty = config.source.bad_sections.output == "empty"
    plan = Plan(
        info.bounds,
        region,
        shapes.slab_shape,
        network.scale,
        network.lattice,
        shapes.levels,
        shapes.fidelity,
        tuple(bad),
        lossy,
        empty,
    )
    _within_budget(config, plan)
    looked = survey(config.source, info, plan, config.work.retries) if config.source.bad_sections.detect else None
    if looked is not None:
        bad = dict(sorted((_detected(target_url, looked, source, look) | bad).items()))
        bad_sections.check_allowed(config.source.bad_sections, bad, info)
        plan = dataclasses.replace(plan, bad_sections=tuple(bad))
    spec = json.loads(json.dumps(_spec(config, info, mask, plan, network, encoding, bad, looked)))
    voxel_nm = (info.voxel_size_nm[0], info.voxel_size_nm[1] / plan.scale, info.voxel_size_nm[2] / plan.scale)
    corner = tuple(c + s * v for c, s, v in zip(info.corner_nm, region.start, info.voxel_size_nm, strict=True))
    target = TargetSpec(
        target_url,
        config.target.format,
        encoding,
        plan.scale,
        voxel_nm,
        (corner[0], corner[1], corner[2]),
        plan.levels,
        plan.fidelity,
        {"emsr": __version__, "digest": digest(spec)} | spec,
    )
    spec = spec | {"slab_shape": list(plan.slab_shape)}
    asked = config.work.requests_per_second
    rates = Rates(asked.read, asked.write) if asked else Rates()
    job = Job(
        digest(spec),
        config.source,
        info.fingerprint,
        network,
        plan,
        target,
        config.work.retries,
        config.work.stall_s,
        rates=rates,
    )
    return Prepared(job, info, spec)


def digest(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_place(prepared: Prepared, store: Store) -> bool:
    """True where an earlier run of the same plan is to be resumed, False where the place is empty. Writes nothing.

    Raises LedgerError where another plan's target stands there, TargetError where anything else does.
    """
    stored = store.get("plan.json")
    if stored is not None:
        same_plan(prepared, stored, store.url)
        return True
    _check_vacant(prepared.job.target.url, store)
    return False


def _check_vacant(target_url: str, store: Store) -> None:
    if not is_empty(target_url):
        raise TargetError(
            f"{target_url} holds something that emsr did not plan (there is no {store.url}/plan.json)",
            "an empty place for the target",
            "Choose another target.url; nothing is ever deleted or overwritten",
        )


def claim(prepared: Prepared, store: Store) -> None:
    """Make the checked place ours: plan.json first, then the target's metadata (the same bytes again on a resume)."""
    if store.get("plan.json") is None:
        plan = prepared.job.plan
        body = {"digest": prepared.job.digest, "slabs": plan.slabs, "tasks": plan.tasks, "spec": prepared.spec}
        store.put("plan.json", json.dumps(body, indent=1).encode())
    open_target(prepared.job.target).create()


def same_plan(prepared: Prepared, stored: bytes, where: str) -> None:
    """Raises LedgerError, showing where the two specs differ, unless `stored` is this plan's plan.json."""
    with _reading_plan(where):
        theirs = json.loads(stored)
        their_digest, their_spec = theirs["digest"], dict(theirs["spec"])
    if their_digest != prepared.job.digest:
        raise LedgerError(
            f"the target was begun with another plan: {_differences(their_spec, prepared.spec)}",
            "the same plan",
            "Restore the earlier volume.yaml to resume it, or choose another target.url",
        )


@contextmanager
def _reading_plan(where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError):
        raise LedgerError(
            f"{where}/plan.json is damaged", "the plan of an earlier run", "Restore it, or choose another target.url"
        ) from None


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    a, b = _flat(theirs), _flat(ours)
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    return "; ".join(f"{k} was {a.get(k)}, is {b.get(k)}" for k in keys[:8]) + ("; …" if len(keys) > 8 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: json.dumps(value)}
    return {
        k: v for key, child in value.items() for k, v in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _spec(
    config: Config,
    info: VolumeInfo,
    mask: VolumeInfo | None,
    plan: Plan,
    network: NetworkSpec,
    encoding: str,
    bad: dict[int, str],
    looked: Survey | None,
) -> dict[str, Any]:
    """Everything that changes the bytes of the target, and nothing that does not: no worker counts, no times, no credentials."""
    source = config.source
    return {
        "format_version": FORMAT_VERSION,
        "source": {
            "url": _public(source.url),
            "format": info.format,
            "fingerprint": info.fingerprint,
            "mip": source.mip,
            "array": source.array,
            "region": {"start": list(plan.region.start), "stop": list(plan.region.stop)},
            "voxel_size_nm": list(info.voxel_size_nm),
            "intensity_window": source.intensity_window and list(source.intensity_window),
            "corner_nm": list(info.corner_nm),
            "missing_chunks": _holes(source.missing_chunks),
            "bad_sections": bad_sections.record(plan, bad, source.bad_sections.output),
            **({"survey": looked.record} if looked is not None else {}),
            "mask": None
            if source.mask is None or mask is None
            else {
                "url": _public(source.mask.url),
                "mip": source.mask.mip,
                "fingerprint": mask.fingerprint,
                "missing_chunks": _holes(source.mask.missing_chunks),
            },
            "skip_empty": source.skip_empty,
        },
        "network": {k: v for k, v in dataclasses.asdict(network).items() if k not in ("lattice", "weights")},
        "lattice": dataclasses.asdict(network.lattice),
        "target": {
            "format": config.target.format,
            "encoding": encoding,
            "levels": [{"shape": list(v.shape), "chunk": list(v.chunk), "shard": list(v.shard)} for v in plan.levels],
            "fidelity": plan.fidelity is not None,
        },
    }


def _holes(rule: str | FillConfig) -> str | dict[str, int]:
    return {"fill": rule.fill} if isinstance(rule, FillConfig) else rule


def _public(url: str) -> str:
    """The URL without user, password or query (where tokens travel)."""
    return re.sub(r"\?.*$", "", re.sub(r"://[^/@]*@", "://", url))


def _target_url(config: Config) -> str:
    kind, url = urls.split_format(config.target.url)
    if (kind is not None and (kind == "precomputed") != (config.target.format == "precomputed")) or kind in (
        "zarr2",
        "n5",
    ):
        raise TargetError(
            f"target.url begins with {kind}://, target.format is {config.target.format}",
            "one format",
            "Remove the prefix or change target.format",
        )
    if url.startswith(("http://", "https://")):
        raise TargetError(
            f"target.url {url} cannot be written: http is read only",
            "a path, s3:// or gs://",
            "Choose another target.url",
        )
    if not re.sub(r"^\w+://[^/]*", "", url).strip("/"):
        raise TargetError(f"target.url {url} is a bucket's root", "a folder in it", "Append a name for the volume")
    others = {
        "source.url": config.source.url,
        "source.mask.url": config.source.mask.url if config.source.mask else None,
    }
    for key, other in others.items():
        theirs = urls.split_format(other)[1] if other else None
        if theirs and (theirs == url or theirs.startswith(url + "/") or url.startswith(theirs + "/")):
            raise TargetError(
                f"target.url {url} and {key} {theirs} lie in one another", "two places", "Choose another target.url"
            )
    return url


def _region(config: Config, info: VolumeInfo) -> Box:
    if config.source.box is None:
        return info.bounds
    box = config.source.box.box
    if not info.bounds.contains(box):
        raise SourceError(
            f"source.box {box} reaches out of the volume",
            f"a box inside {info.bounds} (z, y, x; LR voxels)",
            "Shrink source.box",
        )
    return box


def _detected(target_url: str, looked: Survey, source: Source, look: Detect | None) -> dict[int, str]:
    """The bad sections that are not listed: those of the plan that stands beside the target, else what is seen now."""
    store = Store(sidecar(target_url))
    stored = store.get("plan.json")
    if stored is not None:
        with _reading_plan(store.url):
            theirs = bad_sections.detected(json.loads(stored)["spec"]["source"]["bad_sections"])
        return {z: why for z, why in theirs.items() if z in looked.sections}
    if look is None:
        raise LedgerError(
            f"nothing was run for {target_url} yet", "a target with its ledger", "Run python -m pipeline.run first"
        )
    _check_vacant(target_url, store)
    try:
        return look(looked, source)
    except TransientError as error:
        raise SourceError(
            f"the source cannot be reached: {error}", "", "Run the same command again: what was looked at is kept"
        ) from None


def _within_budget(config: Config, plan: Plan) -> None:
    if config.work.budget is None:
        return
    size = output_voxels(plan)
    if size > config.work.budget.output_bytes:
        raise TargetError(
            f"the output would be {size:,} bytes before compression, work.budget.output_bytes is {config.work.budget.output_bytes:,}",
            "an output within the budget",
            "Cut a source.box, use fewer mips, or raise the budget",
        )
