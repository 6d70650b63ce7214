"""The specification of a run: everything that changes a target's bytes, as plain JSON; its digest; how two differ."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from pipeline.config.volume import Config, FillConfig
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.sections import bad_sections
from pipeline.sections.survey import Survey
from pipeline.storage.volume import VolumeInfo

FORMAT_VERSION = 1
"""Raised whenever the same volume.yaml would give other bytes: it is part of the digest."""


@dataclass(frozen=True)
class Choices:
    """What was found and decided for a volume.yaml, before anything is written.

    `bad_sections` maps a section to why it is bad. `survey` is the pass that detected them, None where they are only
    listed.
    """

    config: Config
    source: VolumeInfo
    mask: VolumeInfo | None
    network: NetworkSpec
    plan: Plan
    encoding: str
    bad_sections: dict[int, str]
    survey: Survey | None


def recorded_network(spec: dict[str, Any]) -> dict[str, Any]:
    """The keys of volume.yaml's `network` that a run may choose, as an earlier one has chosen them."""
    network, lattice = spec["network"], spec["lattice"]
    return {
        "precision": network["precision"],
        "batch": network.get("batch", 1),
        "cell": lattice["cell"],
        "halo": lattice["halo"],
    }


def specification(choices: Choices) -> dict[str, Any]:
    """Everything that changes the target's bytes, and nothing that does not: no worker counts, times, credentials.

    It is plain JSON. `prepare` adds the slab shape for plan.json. A new key of volume.yaml that changes bytes goes in
    here, and only where it is not the default, as `survey`, `invert` and `batch` do: else every target that was begun
    before is refused.
    """
    network = {k: v for k, v in dataclasses.asdict(choices.network).items() if k not in ("lattice", "weights")}
    if network["batch"] == 1:
        del network["batch"]
    if choices.network.narrow:
        network["kernels"] = "stored"  # earlier commits cast them in every call, which gave other bytes
    plan = choices.plan
    levels = [{"shape": list(v.shape), "chunk": list(v.chunk), "shard": list(v.shard)} for v in plan.levels]
    found = {
        "format_version": FORMAT_VERSION,
        "source": _source(choices),
        "network": network,
        "lattice": dataclasses.asdict(choices.network.lattice),
        "target": {
            "format": choices.config.target.format,
            "encoding": choices.encoding,
            "levels": levels,
            "fidelity": plan.fidelity is not None,
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _source(choices: Choices) -> dict[str, Any]:
    source, info, plan = choices.config.source, choices.source, choices.plan
    return {
        "url": _public(source.url),
        "format": info.format,
        "fingerprint": info.fingerprint,
        "mip": source.mip,
        "array": source.array,
        "region": {"start": list(plan.region.start), "stop": list(plan.region.stop)},
        "voxel_size_nm": list(info.voxel_size_nm),
        "intensity_window": source.intensity_window and list(source.intensity_window),
        **({"invert": True} if source.invert else {}),
        "corner_nm": list(info.corner_nm),
        "missing_chunks": _holes(source.missing_chunks),
        "bad_sections": bad_sections.record(plan, choices.bad_sections, source.bad_sections.output),
        **({"survey": choices.survey.record} if choices.survey is not None else {}),
        "mask": _mask(choices),
        "skip_empty": source.skip_empty,
    }


def _mask(choices: Choices) -> dict[str, Any] | None:
    mask, info = choices.config.source.mask, choices.mask
    if mask is None or info is None:
        return None
    found = {
        "url": _public(mask.url),
        "mip": mask.mip,
        "fingerprint": info.fingerprint,
        "missing_chunks": _holes(mask.missing_chunks),
    }
    if not _same_space(info, choices.source):
        found |= {"voxel_size_nm": info.voxel_size_nm, "corner_nm": info.corner_nm}
    return found


def _same_space(mask: VolumeInfo, source: VolumeInfo) -> bool:
    """Whether the mask spans what the source spans, as one does that states neither voxel size nor position."""
    mine, other = [*mask.corner_nm, *_extent_nm(mask)], [*source.corner_nm, *_extent_nm(source)]
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6) for a, b in zip(mine, other, strict=True))


def _extent_nm(info: VolumeInfo) -> list[float]:
    return [count * size for count, size in zip(info.bounds.shape, info.voxel_size_nm, strict=True)]


def _holes(rule: str | FillConfig) -> str | dict[str, int]:
    return {"fill": rule.fill} if isinstance(rule, FillConfig) else rule


def _public(url: str) -> str:
    """The URL without user, password or query, in which tokens travel."""
    return re.sub(r"\?.*$", "", re.sub(r"://[^/@]*@", "://", url))


def digest(spec: dict[str, Any]) -> str:
    """The SHA-256 of a specification, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The keys in which two specifications differ, with both values; up to eight of them. Those of the lattice are
    named as in volume.yaml; how kernels are stored goes without saying where the precision differs.
    """
    a, b = _flat(theirs), _flat(ours)
    keys = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    if "network.precision" in keys and "network.kernels" in keys:
        keys.remove("network.kernels")
    said = [f"{re.sub('^lattice', 'network', k)} was {a.get(k)}, is {b.get(k)}" for k in keys[:8]]
    return "; ".join(said) + ("; …" if len(keys) > 8 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: json.dumps(value)}
    return {
        k: v for key, child in value.items() for k, v in _flat(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
