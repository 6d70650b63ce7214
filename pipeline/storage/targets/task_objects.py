"""Which stored objects a task makes, and the checksum that its receipt holds of them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from pipeline.plan.plan import Plan
from pipeline.plan.target_spec import FIDELITY
from pipeline.storage.volume import Encoded, Target


def object_keys(target: Target, plan: Plan, index: int) -> list[str]:
    """The keys that task `index` writes, sorted."""
    if index >= plan.slabs:
        block = plan.pyramid_block(index)
        return target.keys(block.level, block.write)
    slab = plan.slab(index)
    keys = [key for level in range(plan.levels_by_slabs) for key in target.keys(level, plan.level_box(slab, level))]
    return sorted(keys + (target.keys(FIDELITY, plan.fidelity_box(slab)) if plan.fidelity is not None else []))


def checksum(objects: Mapping[str, Encoded]) -> int:
    """The CRC-32 over keys and bytes, in key order."""
    crc = 0
    for key in sorted(objects):
        crc = zlib.crc32(objects[key], zlib.crc32(key.encode(), crc))
    return crc
