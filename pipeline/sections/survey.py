"""Detection of bad sections before a run: sample boxes are read once and measured, and the measurements are stored.

At most 4 x 4 boxes of 128 x 128 voxels of a section are read, at fixed places of the volume, whatever its size and
whatever `source.box` says: a section gets the same verdict in every run (law 1), at little cost. Voxels finer than
COARSE_NM are averaged to that first, since neighbouring sections, 40 nm apart, have little in common below it. Stored
measurements let an interrupted pass resume:

    <target>.emsr/sections-<key>/<first z>.npz      measurements of a group of consecutive sections
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
from pipeline.base.limits import MAX_SURVEYED
from pipeline.base.retry import retrying
from pipeline.config.volume import SourceConfig
from pipeline.plan.plan import Plan
from pipeline.sections.quality import AROUND, LAGS, MIN_CORRELATION, Floats, Measured, judge, measure, resemblance
from pipeline.storage.kv import Store
from pipeline.storage.volume import Source, VolumeInfo

VERSION = 1
"""Part of the digest. It is raised whenever the same voxels would be judged otherwise."""
SIDE = 128
"""Averaged voxels across a sample box."""
MAX_BOXES = 4
"""Sample boxes along y, and along x."""
COARSE_NM = 32.0
"""Voxels finer than this are averaged, y and x."""
RUN = 32
"""Sections that are measured and stored together, about: a multiple of the chunk's depth where that is not more."""
MARGIN = 2 * AROUND
"""Sections measured on either side of those that a run reads, so that each is judged as in a run of all sections."""


@dataclass(frozen=True)
class Survey:
    """Which sections of which volume are measured. `listed` ones are known to be bad."""

    source: SourceConfig
    info: VolumeInfo
    sections: range
    listed: frozenset[int]
    retries: int

    @property
    def key(self) -> str:
        """16 hexadecimal digits, a hash of everything that the measurements depend on."""
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
            *(["invert"] if s.invert else []),
        ]
        return hashlib.sha256(json.dumps([*parts, self.sections.start, self.sections.stop]).encode()).hexdigest()[:16]

    @property
    def record(self) -> dict[str, Any]:
        """What the plan records of the survey."""
        return {"version": VERSION, "sections": [self.sections.start, self.sections.stop]}

    @property
    def step(self) -> int:
        """Voxels across the squares of LR voxels that are averaged; fewer where a section is small."""
        shape = self.info.bounds.shape
        return max(1, min(int(COARSE_NM // max(self.info.voxel_size_nm[1:])), min(shape.y, shape.x) // SIDE))

    def boxes(self) -> list[Box]:
        """The sample boxes of one section in LR voxels, with z from 0 to 1.

        Each lies in the middle of an equal part.
        """
        bounds = self.info.bounds
        rows, cols = (
            _spread(getattr(bounds.start, axis), getattr(bounds.shape, axis), self.step) for axis in ("y", "x")
        )
        return [Box(ZYX(0, y.start, x.start), ZYX(1, y.stop, x.stop)) for y in rows for x in cols]

    def runs(self) -> list[range]:
        """The sections in groups along the chunk grid, each of which is read, measured and stored together."""
        origin, depth = self.info.bounds.start.z, self.info.chunk_shape.z
        step = depth * (RUN // depth) if depth <= RUN else RUN
        first = (self.sections.start - origin) // step
        last = -(-(self.sections.stop - origin) // step)
        cuts = [origin + i * step for i in range(first, last + 1)]
        return [range(max(a, self.sections.start), min(a + step, self.sections.stop)) for a in cuts[:-1]]


def survey(source: SourceConfig, info: VolumeInfo, plan: Plan, retries: int) -> Survey:
    """The survey of the sections that a plan reads, and MARGIN more. `plan.bad_sections` are the listed ones.

    Raises SourceError where they are more than are looked at.
    """
    reach = plan.lattice.z_halo + MARGIN
    low, high = (
        max(info.bounds.start.z, plan.region.start.z - reach),
        min(info.bounds.stop.z, plan.region.stop.z + reach),
    )
    if high - low > MAX_SURVEYED:
        raise SourceError(
            f"source.bad_sections.detect would look at {high - low:,} sections",
            f"at most {MAX_SURVEYED:,}",
            "Cut a source.box, or list bad sections by source.bad_sections.list",
        )
    return Survey(source, info, range(low, high), frozenset(plan.bad_sections), retries)


def detect(
    wanted: Survey, source: Source, store: Store, keep: bool, progress: Callable[[int], None] = lambda done: None
) -> dict[int, str]:
    """The bad sections that are not listed: z -> reason.

    Measurements that `store` holds are not made again; new ones are put there if `keep`. `progress` is called with the
    number of sections measured so far. Raises SourceError where neighbouring sections have too little in common to
    judge by, TransientError where the source cannot be reached.
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
    if common < MIN_CORRELATION:
        raise SourceError(
            f"source.bad_sections.detect: neighbouring sections correlate by {common:.2f} only, "
            "so that bad ones do not stand out",
            f"at least {MIN_CORRELATION}",
            "List the bad sections in source.bad_sections.list instead",
        )
    first = wanted.sections.start
    listed = [z - first for z in wanted.listed if z in wanted.sections]
    return {first + i: why for i, why in judge(measured, listed, wanted.step).items()}


def delete_measurements(wanted: Survey, store: Store) -> None:
    """Delete the stored measurements, so that repaired sections are measured again."""
    for key in store.keys(f"sections-{wanted.key}/"):
        store.delete(key)


def _spread(start: int, extent: int, step: int) -> list[range]:
    """Up to MAX_BOXES ranges of SIDE * step voxels along an axis, spread evenly over `extent` voxels from `start`."""
    size = min(extent // step, SIDE) * step
    count = min(MAX_BOXES, extent // size)
    begins = [start + (2 * i + 1) * extent // (2 * count) - size // 2 for i in range(count)]
    return [range(begin, begin + size) for begin in (min(max(b, start), start + extent - size) for b in begins)]


def _read(wanted: Survey, source: Source, sections: range) -> Floats:
    """The sample boxes, (n, boxes, h, w), as `measure` takes them.

    Missing or damaged ones are NaN: the run will report them.
    """
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
    """One sample box in all of `sections`, averaged, (n, h, w)."""
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
    """Stored measurements of so many sections; None where they are absent or damaged: they are made again then."""
    if stored is None:
        return None
    try:
        with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
            found = Measured(*(arrays[f.name] for f in fields(Measured)))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        return None
    return found if len(found.contrast) == sections else None
