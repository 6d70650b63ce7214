"""The pass that looks at sections before a run: sample boxes read once, measured, kept beside the target so that it can be resumed.

A section is seen through at most 4 x 4 boxes of 128 x 128 voxels at fixed places of the volume, whatever its size and whatever
`source.box` says, so that a section has one verdict (law 1) and costs little. Voxels finer than COARSE_NM are averaged to that
first: neighbours 40 nm apart have little in common below.

    <target>.emsr/sections-<key>/<first z>.npz      measurements of a run of sections
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pipeline.base.errors import DataError, SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.retry import retrying
from pipeline.config.volume import SourceConfig
from pipeline.plan.plan import Plan
from pipeline.sections.quality import AROUND, LAGS, TELLING, Floats, Measured, judge, measure, resemblance
from pipeline.storage.kv import Store
from pipeline.storage.volume import Source, VolumeInfo

VERSION = 1
"""Raised whenever the same voxels would be judged otherwise: it is part of the digest."""
SIDE = 128
ACROSS = 4
COARSE_NM = 32.0
RUN = 32
"""Sections measured and kept at a time, about: whole chunks where they are no deeper."""
MARGIN = 2 * AROUND
"""Sections beyond those that a run reads, so that they are judged by the same surroundings as in a run of the whole volume."""


@dataclass(frozen=True)
class Survey:
    """Which sections are looked at, and in which volume; `listed` ones are known to be bad."""

    source: SourceConfig
    info: VolumeInfo
    sections: range
    listed: frozenset[int]
    retries: int

    @property
    def key(self) -> str:
        """Of everything that the measurements depend on."""
        s = self.source
        parts = [
            VERSION,
            self.step,
            s.url,
            self.info.fingerprint,
            s.mip,
            s.array,
            s.intensity_window,
            s.model_dump(mode="json")["missing_chunks"],
        ]
        return hashlib.sha256(json.dumps([*parts, self.sections.start, self.sections.stop]).encode()).hexdigest()[:16]

    @property
    def record(self) -> dict[str, Any]:
        """What a plan says of it."""
        return {"version": VERSION, "sections": [self.sections.start, self.sections.stop]}

    @property
    def step(self) -> int:
        """LR voxels that are averaged, across; fewer where little would be left of a small section."""
        shape = self.info.bounds.shape
        return max(1, min(int(COARSE_NM // max(self.info.voxel_size_nm[1:])), min(shape.y, shape.x) // SIDE))

    def boxes(self) -> list[Box]:
        """Sample boxes of one section, LR voxels; z stays 0 .. 1. In the middle of equal parts of the section."""
        bounds = self.info.bounds
        rows, cols = (
            _spread(getattr(bounds.start, axis), getattr(bounds.shape, axis), self.step) for axis in ("y", "x")
        )
        return [Box(ZYX(0, y.start, x.start), ZYX(1, y.stop, x.stop)) for y in rows for x in cols]

    def runs(self) -> list[range]:
        """The sections in runs on the chunk grid, each read, measured and kept as one."""
        origin, depth = self.info.bounds.start.z, self.info.chunk_shape.z
        step = depth * (RUN // depth) if depth <= RUN else RUN
        first = (self.sections.start - origin) // step
        last = -(-(self.sections.stop - origin) // step)
        cuts = [origin + i * step for i in range(first, last + 1)]
        return [range(max(a, self.sections.start), min(a + step, self.sections.stop)) for a in cuts[:-1]]


def survey(source: SourceConfig, info: VolumeInfo, plan: Plan, retries: int) -> Survey:
    """Of the sections that a plan reads, with those beside them; `plan.bad_sections` are the listed ones."""
    reach = plan.lattice.z_halo + MARGIN
    low, high = (
        max(info.bounds.start.z, plan.region.start.z - reach),
        min(info.bounds.stop.z, plan.region.stop.z + reach),
    )
    return Survey(source, info, range(low, high), frozenset(plan.bad_sections), retries)


def look(
    wanted: Survey, source: Source, store: Store, keep: bool, progress: Callable[[int], None] = lambda done: None
) -> dict[int, str]:
    """z -> why, of the bad sections that are not listed. What `store` holds is not read again; without `keep` nothing is written.

    `progress` is told how many sections are measured. Raises SourceError where neighbours have too little in common to tell.
    """
    parts: list[Measured] = []
    before: tuple[int, Floats] | None = None
    for run in wanted.runs():
        name = f"sections-{wanted.key}/{run.start}.npz"
        found = _unpacked(store.get(name), len(run))
        if found is None:
            start = max(wanted.sections.start, run.start - LAGS)
            behind = (
                before[1]
                if before is not None and before[0] == run.start
                else _read(wanted, source, range(start, run.start))
            )
            voxels = np.concatenate([behind, _read(wanted, source, run)])
            found = measure(voxels, len(behind))
            before = run.stop, voxels[-LAGS:]
            if keep:
                store.put(name, _packed(found))
        parts.append(found)
        progress(run.stop - wanted.sections.start)
    measured = Measured.joined(parts)
    common = resemblance(measured)
    if common < TELLING:
        raise SourceError(
            f"source.bad_sections.detect: neighbouring sections correlate by {common:.2f} only, so that bad ones do not stand out",
            f"at least {TELLING}",
            "List the bad sections in source.bad_sections.list instead",
        )
    first = wanted.sections.start
    return {
        first + i: why
        for i, why in judge(measured, [z - first for z in wanted.listed if z in wanted.sections], wanted.step).items()
    }


def forget(wanted: Survey, store: Store) -> None:
    """Take away what was kept, so that mended sections are looked at again."""
    for key in store.keys(f"sections-{wanted.key}/"):
        store.delete(key)


def _spread(start: int, extent: int, step: int) -> list[range]:
    size = min(extent // step, SIDE) * step
    count = min(ACROSS, extent // size)
    begins = [start + (2 * i + 1) * extent // (2 * count) - size // 2 for i in range(count)]
    return [range(begin, begin + size) for begin in (min(max(b, start), start + extent - size) for b in begins)]


def _read(wanted: Survey, source: Source, sections: range) -> Floats:
    """(n, boxes, h, w) as `measure` takes it. What is missing or damaged is NaN here, and an error where the run reads it."""
    boxes = wanted.boxes()
    _, height, width = boxes[0].shape
    voxels = np.full((len(sections), len(boxes), height // wanted.step, width // wanted.step), np.nan, np.float32)
    if not sections:
        return voxels
    for i, box in enumerate(boxes):
        try:
            voxels[:, i] = _column(wanted, source, box, sections)
        except DataError:
            for n, z in enumerate(sections):
                try:
                    voxels[n, i] = _column(wanted, source, box, range(z, z + 1))[0]
                except DataError:
                    continue
    return voxels


def _column(wanted: Survey, source: Source, box: Box, sections: range) -> Floats:
    """The box in those sections, (n, h, w), averaged."""
    there = Box(ZYX(sections.start, box.start.y, box.start.x), ZYX(sections.stop, box.stop.y, box.stop.x))
    voxels = retrying(lambda: source.read(there), wanted.retries)
    n, h, w = voxels.shape
    averaged: Floats = voxels.reshape(n, h // wanted.step, wanted.step, w // wanted.step, wanted.step).mean(
        (2, 4), dtype=np.float32
    )
    return averaged


def _packed(found: Measured) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **{f.name: getattr(found, f.name) for f in fields(Measured)})
    return file.getvalue()


def _unpacked(stored: bytes | None, sections: int) -> Measured | None:
    """None where there is nothing, or nothing whole: those sections are measured again."""
    if stored is None:
        return None
    try:
        with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
            found = Measured(*(arrays[f.name] for f in fields(Measured)))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        return None
    return found if len(found.contrast) == sections else None
