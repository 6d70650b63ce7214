"""The rules by which sections are judged bad from their voxels alone: measurements first, then verdicts with a reason.

A section is compared with those around it in z, never with fixed grey values: one that is unusual there and resembles
no neighbour is bad; an empty end of the volume, a change of staining and a jump of the alignment are not. A new rule on
grey values goes into `_unusual`, one on resemblance into `_Links`; a rule that changes verdicts raises survey.VERSION.

    . . o o o x o o o . .      x is compared with the good sections nearest to it, up to LAGS away, so that the
        |---| |---|            neighbours of a bad section are judged by those on their other side
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LAGS = 3
"""A section is compared with up to so many sections before it."""
AROUND = 10
"""Sections on either side from which it is computed what is usual."""
BLOCK = 32
"""Voxels across a block, about. Boxes are compared block by block."""
MAX_SHIFT = 16
"""Voxels up to which two sections are displaced to find their best match, at most a quarter of the box."""
FLAT = 1.0
"""Standard deviation, in grey values, below which a block or section counts as without structure."""
MAX_CLIPPED = 0.2
"""Share of voxels at 0 or 255, beyond what is usual, from which a section is black or saturated."""
MAX_FLAT_RUN = 5
"""More consecutive sections without structure than this are an empty part of the volume, not bad sections."""
MIN_CONTRAST = 0.4
"""Share of the usual contrast below which a section is of low contrast."""
MIN_BLOCK_CORRELATION = 0.1
"""Where the usual correlation of neighbouring blocks is below this, the blocks are not judged."""
MIN_CORRELATION = 0.2
"""Correlation of neighbouring sections below which bad ones do not stand out; unrelated ones reach 0.15 at best."""
MIN_RESEMBLANCE = (0.75, 0.65, 0.6)
"""Share of the usual resemblance, 1 .. LAGS sections apart, from which two show the same tissue."""
SPREAD = 4
"""The same share is lower where resemblance varies by itself, as in small or faint sections: 1 minus so many times the
distance of its median from its upper quartile."""
MIN_RESEMBLANCE_ACROSS = 0.5
"""The same share for two sections on either side of others that resemble only each other."""
MIN_RESEMBLANCE_IN_PART = 0.35
"""Share of the usual resemblance from which a part of the section shows the same tissue."""
MAX_DISPLACEMENT = 4
"""Voxels of displacement, against every good neighbour, from which a section is misplaced: half the halo of a tile."""
JITTER = 3
"""Or so many times the usual displacement, where that is more."""


@dataclass(frozen=True)
class Measured:
    """Measurements of N consecutive sections in B boxes of Q blocks each; NaN where nothing could be read or compared.

    `contrast` (N): median over blocks of the standard deviation, in grey values. `black`, `white` (N): shares of voxels
    at 0 and at 255. `alike` (N, LAGS, B * Q): correlation of each block with the section 1 .. LAGS before, at the box's
    best displacement. `moved` (N, LAGS, B, 2): that displacement in voxels, y and x.
    """

    contrast: Floats
    black: Floats
    white: Floats
    alike: Floats
    moved: Floats

    @staticmethod
    def joined(parts: list[Measured]) -> Measured:
        """The measurements of consecutive parts as one."""
        return Measured(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Measured)))


def measure(voxels: Floats, before: int = 0) -> Measured:
    """Measure consecutive sections. `voxels` (n, B, h, w) are B boxes at the same places in each.

    A box of NaN could not be read. The first `before` sections are not measured themselves, later ones are compared
    with them.
    """
    count, boxes, height, width = voxels.shape
    cuts = (_cuts(height), _cuts(width))
    blocks = cuts[0] * cuts[1]
    alike = np.full((count, LAGS, boxes, blocks), np.nan, np.float32)
    moved = np.full((count, LAGS, boxes, 2), np.nan, np.float32)
    for box in range(boxes):
        spectra: dict[int, NDArray[np.complex128]] = {}
        reach = min(MAX_SHIFT, min(height, width) // 4)
        for z in range(count):
            section = voxels[z, box]
            spectra[z] = np.fft.rfft2(section - section.mean(), (height + reach, width + reach))
            for lag in range(1, LAGS + 1):
                if z < before or z - lag < 0 or np.isnan(section).any() or np.isnan(voxels[z - lag, box]).any():
                    continue
                shift = _displacement(spectra[z], spectra[z - lag], (height, width), reach)
                moved[z, lag - 1, box] = shift
                alike[z, lag - 1, box] = _block_correlations(section, voxels[z - lag, box], shift, cuts)
            spectra.pop(z - LAGS, None)
    kept = voxels[before:]
    deviations = np.stack([block.std(axis=(2, 3)) for block in _blocks(kept, cuts)], -1).reshape(len(kept), -1)
    return Measured(
        contrast=_median(deviations, 1),
        black=_share(kept, kept <= 0),
        white=_share(kept, kept >= 255),
        alike=alike[before:].reshape(len(kept), LAGS, -1),
        moved=moved[before:],
    )


def judge(found: Measured, listed: Collection[int] = (), step: int = 1) -> dict[int, str]:
    """The bad sections, index -> reason. Sections that are `listed` as bad already are left out of every comparison.

    `step` is the number of LR voxels along a measured voxel; displacements are stated in LR voxels.
    """
    bad = _unusual(found, listed)
    left_out = set(bad) | set(listed)
    links = _Links(found, left_out)
    good = links.runs()
    if not good:
        return bad
    doubtful = set(range(len(found.contrast))) - good - left_out
    while joined := links.joined(doubtful, good):
        good |= joined
        doubtful -= joined
    return dict(sorted((bad | {i: links.why(i, good, step) for i in doubtful}).items()))


def resemblance(found: Measured) -> float:
    """Median correlation of neighbouring sections, block by block; NaN where there is nothing to compare.

    Below MIN_CORRELATION no verdicts are possible.
    """
    return float(_median(found.alike[:, 0].ravel(), 0))


def _unusual(found: Measured, listed: Collection[int]) -> dict[int, str]:
    """Sections that are black, saturated, constant or of low contrast compared with those around: index -> reason."""
    bad: dict[int, str] = {}
    known = np.isin(np.arange(len(found.contrast)), list(listed)) | _empty(found.contrast)
    contrast, black, white = (np.where(known, np.nan, values) for values in (found.contrast, found.black, found.white))
    usual, usual_black, usual_white = (_usual(values, 0.5) for values in (contrast, black, white))
    for i in np.flatnonzero(~np.isnan(contrast)):
        if black[i] - usual_black[i] > MAX_CLIPPED:
            bad[int(i)] = f"black ({black[i]:.0%} of it)"
        elif white[i] - usual_white[i] > MAX_CLIPPED:
            bad[int(i)] = f"saturated ({white[i]:.0%} of it)"
        elif contrast[i] < FLAT < MIN_CONTRAST * usual[i]:
            bad[int(i)] = "constant"
        elif contrast[i] < MIN_CONTRAST * usual[i]:
            bad[int(i)] = f"low contrast ({contrast[i] / usual[i]:.0%} of what is usual around it)"
    return bad


def _empty(contrast: Floats) -> NDArray[np.bool_]:
    """Sections within more than MAX_FLAT_RUN consecutive ones without structure: the volume is empty there."""
    flat = np.r_[False, contrast < FLAT, False]
    starts, stops = np.flatnonzero(flat[1:] & ~flat[:-1]), np.flatnonzero(flat[:-1] & ~flat[1:])
    empty = np.zeros(len(contrast), bool)
    for start, stop in zip(starts, stops, strict=True):
        empty[start:stop] = stop - start > MAX_FLAT_RUN
    return empty


class _Links:
    """Which sections show the same tissue at the same place."""

    def __init__(self, found: Measured, left_out: Collection[int]) -> None:
        self._count = len(found.contrast)
        self._left_out = left_out
        out = np.isin(np.arange(self._count), list(left_out))
        touched = np.stack([out | np.r_[np.zeros(lag, bool), out][: self._count] for lag in range(1, LAGS + 1)], 1)
        alike = np.where(touched[..., None], np.nan, found.alike)
        usual = _usual(alike, 0.75)
        with np.errstate(invalid="ignore", divide="ignore"):
            kept = _mean(np.where(usual >= MIN_BLOCK_CORRELATION, np.clip(alike / usual, 0, 1), np.nan))
        upper, middle = _usual(kept, 0.75), _usual(kept, 0.5)
        self._kept = kept / upper  # how far blocks differ among themselves is no sign of damage
        self._bars = np.fmin(MIN_RESEMBLANCE, 1 - SPREAD * (1 - middle / upper))
        self._moved = np.where(touched[..., None], np.nan, _median(found.moved, 2))
        far = np.abs(self._moved).max(-1)
        self._far = far
        self._reach = np.fmax(MAX_DISPLACEMENT, JITTER * _usual(far[:, 0], 0.5))

    def alike(self, low: int, high: int, bar: float = 1.0) -> bool:
        """Whether section `high` shows the same tissue as `low`, up to LAGS before it, or they cannot be compared.

        `bar` is the share of the usual resemblance that suffices, where it is less than the usual bar.
        """
        pair = high, high - low - 1
        return bool(
            np.isnan(self._kept[pair])
            or (self._kept[pair] >= min(bar, self._bars[pair]) and self._far[pair] < self._reach[high])
        )

    def runs(self) -> set[int]:
        """Sections that resemble a direct neighbour.

        Fewer than LAGS sections that resemble only each other are left out where the sections on either side resemble
        one another: they come from elsewhere.
        """
        good: set[int] = set()
        start = 0
        for stop in range(1, self._count + 1):
            if stop < self._count and self._both(stop - 1, stop) and self.alike(stop - 1, stop):
                continue
            skipped = (
                start > 0
                and stop < self._count
                and stop - start < LAGS
                and self._both(start - 1, stop)
                and self.alike(start - 1, stop, MIN_RESEMBLANCE_ACROSS)
            )
            if stop - start > 1 and not skipped:
                good.update(range(start, stop))
            start = stop
        return good

    def _both(self, low: int, high: int) -> bool:
        return low not in self._left_out and high not in self._left_out

    def joined(self, doubtful: Collection[int], good: Collection[int]) -> set[int]:
        """The doubtful sections that resemble a nearest good one, at the smallest distance at which there are any.

        Sections that are farther apart resemble each other too easily.
        """
        for lag in range(1, LAGS + 1):
            if found := {
                i
                for i in doubtful
                if any(self.alike(min(i, j), max(i, j)) for j in self._nearest(i, good) if abs(i - j) == lag)
            }:
                return found
        return set()

    def _nearest(self, i: int, good: Collection[int]) -> Iterator[int]:
        """The nearest good section on either side, up to LAGS away."""
        for step in (-1, 1):
            yield from [j for j in range(i + step, i + step * (LAGS + 1), step) if 0 <= j < self._count and j in good][
                :1
            ]

    def why(self, i: int, good: Collection[int], step: int) -> str:
        """The reason why section `i`, which is not among the good ones, is bad."""
        pairs = [(max(i, j), abs(i - j) - 1) for j in self._nearest(i, good)]
        if not pairs:
            return "resembles no section near it"
        best = max(pairs, key=lambda pair: self._kept[pair])
        kept = self._kept[best]
        if kept >= self._bars[best]:
            y, x = (round(float(d)) * step * (1 if best[0] == i else -1) for d in self._moved[best])
            return f"shifted by ({y}, {x}) LR voxels (y, x)"
        return f"resembles its neighbours by {kept:.0%} of what is usual" + (
            " (folded, torn, or partly lost)" if kept > MIN_RESEMBLANCE_IN_PART else ""
        )


def _displacement(
    section: NDArray[np.complex128], other: NDArray[np.complex128], shape: tuple[int, int], reach: int
) -> tuple[int, int]:
    """(dy, dx), each from -reach to reach, by which `section` is displaced against `other`.

    It is where their correlation, computed from the spectra, is largest per voxel of overlap.
    """
    steps = np.arange(-reach, reach + 1)
    size = (shape[0] + reach, shape[1] + reach)
    surface = np.fft.irfft2(section * np.conj(other), size)[np.ix_(steps, steps)]
    overlap = np.outer(shape[0] - np.abs(steps), shape[1] - np.abs(steps))
    y, x = np.unravel_index(np.argmax(surface / overlap), surface.shape)
    return int(steps[y]), int(steps[x])


def _block_correlations(section: Floats, other: Floats, shift: tuple[int, int], cuts: tuple[int, int]) -> Floats:
    """Pearson's r of each block at a displacement; 0 where one of the two is without structure, NaN where both are."""
    rows, cols = (slice(max(0, d), n + min(0, d)) for d, n in zip(shift, section.shape, strict=True))
    back_rows, back_cols = (slice(max(0, -d), n + min(0, -d)) for d, n in zip(shift, section.shape, strict=True))
    found = []
    for a, b in zip(_blocks(section[rows, cols], cuts), _blocks(other[back_rows, back_cols], cuts), strict=True):
        a, b = a - a.mean(), b - b.mean()
        deviations = np.sqrt((a * a).mean()), np.sqrt((b * b).mean())
        if max(deviations) < FLAT:
            found.append(np.nan)
        else:
            found.append((a * b).mean() / (deviations[0] * deviations[1]) if min(deviations) >= FLAT else 0.0)
    return np.array(found, np.float32)


def _cuts(side: int) -> int:
    """Into how many blocks a side of so many voxels is cut."""
    return max(1, round(side / BLOCK))


def _blocks(voxels: Floats, cuts: tuple[int, int]) -> Iterator[Floats]:
    for rows in np.array_split(voxels, cuts[0], -2):
        yield from np.array_split(rows, cuts[1], -1)


def _usual(values: Floats, quantile: float) -> Floats:
    """Along the first axis: the quantile of up to AROUND values on either side and the value itself, without NaN."""
    return np.stack([_quantile(values[max(0, i - AROUND) : i + AROUND + 1], quantile) for i in range(len(values))])


def _quantile(values: Floats, quantile: float) -> Floats:
    """Along the first axis, without NaN: the value at that place of the sorted ones, never one between two."""
    ordered = np.sort(values, 0)  # NaN comes last
    count = np.count_nonzero(~np.isnan(values), 0)
    place = np.maximum(count - 1, 0) * quantile
    found: Floats = np.take_along_axis(ordered, place.astype(np.intp)[None], 0)[0]
    return found


def _median(values: Floats, axis: int) -> Floats:
    return _quantile(np.moveaxis(values, axis, 0), 0.5)


def _mean(values: Floats) -> Floats:
    """Along the last axis, without NaN; NaN where all are."""
    count = np.count_nonzero(~np.isnan(values), -1)
    mean: Floats = np.where(count, np.nansum(values, -1) / np.maximum(count, 1), np.nan)
    return mean


def _share(voxels: Floats, chosen: NDArray[np.bool_]) -> Floats:
    """Per section, the share of `chosen` voxels among those that could be read; NaN where none could."""
    axes = (1, 2, 3)
    count = np.count_nonzero(~np.isnan(voxels), axes)
    share: Floats = np.where(count, chosen.sum(axes) / np.maximum(count, 1), np.nan).astype(np.float32)
    return share
