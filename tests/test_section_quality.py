"""Verdicts on sections: every kind of damage on real EM, no false alarms, and no trace of how the pass is cut."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from section_damage import DAMAGES

from models.degrade import degrade
from pipeline.sections import quality
from pipeline.sections.quality import (
    AROUND,
    LAGS,
    MIN_CORRELATION,
    Measured,
    _block_correlations,
    _displacement,
    judge,
    measure,
    resemblance,
)
from pipeline.sections.survey import MARGIN

STACKS = [
    ("drosophila-vnc-stack1", 8),
    ("drosophila-vnc-stack1", 16),
    ("flyem-medulla-z40", 8),
    ("flyem-medulla-z40", 16),
    ("flyem-medulla-labelled-z40", 8),
]
TALL = 20


@functools.cache
def real(folder: Path, name: str, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """HR, cut to whole LR voxels, and LR of a stack."""
    hr = tifffile.imread(folder / name / "raw.tif")
    hr = np.ascontiguousarray(hr[:, : hr.shape[1] // scale * scale, : hr.shape[2] // scale * scale])
    return hr, np.stack([degrade(section, scale) for section in hr])


def verdicts(lr: np.ndarray) -> dict[int, str]:
    return judge(measure(lr[:, None].astype(np.float32)))


@pytest.mark.parametrize(("name", "scale"), STACKS)
def test_no_section_of_an_undamaged_stack_is_bad(name: str, scale: int, shared_data: Path) -> None:
    """First and last included: every stretch of 20 sections."""
    _, lr = real(shared_data, name, scale)
    for start in range(0, len(lr) - TALL + 1, 10):
        assert verdicts(lr[start : start + TALL]) == {}, start


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("name", "scale"), STACKS[:4])
def test_two_of_twenty_destroyed_sections_are_found_and_no_good_one(
    name: str, scale: int, damage: str, shared_data: Path
) -> None:
    """At the ends, on either side of a good one, and anywhere."""
    hr, lr = real(shared_data, name, scale)
    rng = np.random.default_rng([scale, len(damage), len(name)])
    for places in ([0, TALL - 1], [8, 10], sorted(rng.choice(TALL, 2, replace=False).tolist())):
        if places[1] - places[0] == 1:
            places[1] = (places[1] + 3) % TALL
        start = int(rng.integers(0, len(lr) - TALL + 1))
        stack = lr[start : start + TALL].copy()
        for z in places:
            stack[z] = degrade(
                np.ascontiguousarray(DAMAGES[damage](hr[start : start + TALL], z, rng).astype(np.uint8)), scale
            )
        assert sorted(verdicts(stack)) == sorted(places), (start, places)


def test_what_is_only_different_is_not_bad(shared_data: Path) -> None:
    """Brightness and contrast, noise, drift, an aligner's jump, a border that moves, a copied section, an empty end."""
    _, lr = real(shared_data, "drosophila-vnc-stack1", 8)
    rng = np.random.default_rng(1)
    assert verdicts(np.stack([np.clip(s * rng.uniform(0.7, 1.3) + rng.uniform(-30, 30), 0, 255) for s in lr])) == {}
    assert verdicts(np.clip(lr + rng.normal(0, 20, lr.shape), 0, 255)) == {}
    assert verdicts(np.stack([np.roll(s, i, 0) for i, s in enumerate(lr)])) == {}
    assert verdicts(np.concatenate([lr[:9], np.roll(lr[9:], 10, 1)])) == {}
    border = lr.copy()
    for z, section in enumerate(border):
        section[:, : 3 * z] = 0
    assert verdicts(border) == {}
    assert verdicts(np.concatenate([lr[:7], lr[6:]])) == {}
    assert verdicts(np.concatenate([np.zeros_like(lr[:8]), lr])) == {}


def test_a_run_of_bad_sections_leaves_its_neighbours_good(shared_data: Path) -> None:
    _, lr = real(shared_data, "drosophila-vnc-stack1", 8)
    rng = np.random.default_rng(2)
    for run in ([6, 7, 8, 9], [0, 1, 2], [5, 7, 9], [12, 13]):
        stack = lr.copy()
        stack[run] = rng.integers(50, 200, stack[run].shape)
        assert sorted(verdicts(stack)) == run
    shifted = lr.copy()
    shifted[[11, 12]] = np.roll(shifted[[11, 12]], 9, 1)
    assert sorted(verdicts(shifted)) == [11, 12], "two that agree with each other alone"


def tissue(sections: int, side: int, seed: int, alike: float = 0.6) -> np.ndarray:
    """Blobs of about 5 voxels that change from section to section; (n, side, side) grey values about 128."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    filter_ = np.exp(-((frequency * 12) ** 2))
    found = [rng.normal(size=(side, side))]
    for _ in range(sections - 1):
        found.append(alike * found[-1] + np.sqrt(1 - alike**2) * rng.normal(size=(side, side)))
    smooth = np.fft.irfft2(np.fft.rfft2(np.stack(found)) * filter_, (side, side))
    return np.clip(128 + 40 * smooth / smooth.std(), 1, 254).round()


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), count=st.integers(12, 24), data=st.data())
def test_any_tenth_of_sections_from_elsewhere_is_found(seed: int, count: int, data: st.DataObject) -> None:
    """Unrelated sections of the same kind, wherever they lie.

    Neighbours correlate by 0.75: of fainter resemblance little is left three sections away.
    """
    bad = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2)))
    volume = tissue(count, 96, seed, 0.75)
    volume[bad] = tissue(60, 96, seed + 1, 0.75)[::30][: len(bad)]
    assert sorted(verdicts(volume)) == bad


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, 13), max_size=4))
def test_measurements_do_not_depend_on_the_runs_they_are_made_in(seed: int, cuts: set[int]) -> None:
    volume = tissue(14, 40, seed).astype(np.float32)[:, None].repeat(2, 1)
    whole = measure(volume)
    edges = [0, *sorted(cuts), 14]
    parts = [measure(volume[max(0, a - LAGS) : b], a - max(0, a - LAGS)) for a, b in itertools.pairwise(edges)]
    joined = Measured.joined(parts)
    for name in ("contrast", "black", "white", "alike", "moved"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name), equal_nan=True), name


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), start=st.integers(0, 40), data=st.data())
def test_a_box_in_z_sees_the_verdicts_of_the_whole(seed: int, start: int, data: st.DataObject) -> None:
    """Law 1: the sections around a box are looked at too."""
    volume = tissue(70, 32, seed)
    for z in data.draw(st.sets(st.integers(0, 69), max_size=7)):
        volume[z] = volume[(z + 35) % 70]
    stop = start + 12
    low, high = max(0, start - MARGIN), min(70, stop + MARGIN)
    whole = {z: why for z, why in verdicts(volume).items() if start <= z < stop}
    part = {z + low: why for z, why in verdicts(volume[low:high]).items() if start <= z + low < stop}
    assert part == whole


def test_listed_sections_are_compared_with_nothing() -> None:
    volume = tissue(12, 64, 3)
    volume[4:6] = 255 - volume[4:6]
    assert 4 not in judge(measure(volume[:, None].astype(np.float32)), listed=[4, 5])
    assert judge(measure(volume[:, None].astype(np.float32)), listed=[4, 5]) == {}


def test_what_cannot_be_read_or_compared_is_not_bad() -> None:
    volume = tissue(12, 64, 4).astype(np.float32)[:, None].repeat(2, 1)
    volume[5] = np.nan
    volume[8, 0] = np.nan
    assert judge(measure(volume)) == {}
    for few in (1, 2):
        assert judge(measure(volume[:few])) == {}
    assert np.isnan(resemblance(measure(volume[:1])))


def test_unrelated_sections_have_no_resemblance() -> None:
    unrelated = tissue(12, 128, 5, alike=0.0).astype(np.float32)[:, None]
    assert (
        resemblance(measure(unrelated))
        < MIN_CORRELATION
        < resemblance(measure(tissue(12, 128, 5).astype(np.float32)[:, None]))
    )


def test_a_displacement_is_that_of_the_section() -> None:
    """Section content 3 lower and 2 to the left: (3, -2)."""
    image = tissue(1, 48, 6)[0]
    window, other = image[10:42, 10:42], image[13:45, 8:40]
    spectra = [np.fft.rfft2(v - v.mean(), (40, 40)) for v in (window, other)]
    assert _displacement(spectra[0], spectra[1], (32, 32), 8) == (3, -2)


def test_block_correlations_by_hand() -> None:
    """Two blocks side by side, 1 x 4 each: (0, 2, 4, 6) against (0, 4, 2, 6) is 16 / 20.

    A flat one against another is 0, and two flat ones are NaN.
    """
    a = np.array([[0, 2, 4, 6, 9, 9, 9, 9]], np.float32)
    b = np.array([[0, 4, 2, 6, 1, 9, 1, 9]], np.float32)
    assert np.allclose(_block_correlations(a, b, (0, 0), (1, 2)), [0.8, 0.0])
    assert np.isnan(_block_correlations(a, a, (0, 0), (1, 2))[1])


def test_what_is_usual_is_taken_from_the_sections_around() -> None:
    """A volume that fades to a third of its contrast over its depth holds no pale section; one that drops does."""
    depth = 4 * AROUND
    volume = tissue(depth, 64, 7)
    fading = 128 + (volume - 128) * np.linspace(1, 0.33, depth)[:, None, None]
    assert verdicts(fading) == {}
    volume[9] = 128 + (volume[9] - 128) * 0.33
    assert verdicts(volume)[9].startswith("low contrast")


def measured(contrast: list[float], **changes: np.ndarray) -> Measured:
    """Sections of these contrasts that all resemble each other, in one box of one block."""
    n = len(contrast)
    values = {"black": np.zeros(n), "white": np.zeros(n), "alike": np.full((n, LAGS, 1), 0.9)}
    values |= {"contrast": np.array(contrast), "moved": np.zeros((n, LAGS, 1, 2))}
    return Measured(**{name: value.astype(np.float32) for name, value in (values | changes).items()})


@pytest.mark.parametrize(("run", "bad"), [(5, range(10, 15)), (6, ())])
def test_a_long_run_that_shows_nothing_is_an_empty_part(run: int, bad: Collection[int]) -> None:
    """Up to EMPTY sections are lost ones."""
    found = judge(measured([20.0] * 10 + [0.0] * run + [20.0] * 20))
    assert found == dict.fromkeys(bad, "constant")


def test_little_contrast_is_judged_by_what_is_usual() -> None:
    """0.9 grey levels beside 2 are faint, as all is there; beside 20 they are nothing."""
    assert judge(measured([2.0] * 15 + [0.9] + [2.0] * 15)) == {}
    assert judge(measured([20.0] * 15 + [0.9] + [20.0] * 15)) == {15: "constant"}
    assert judge(measured([20.0] * 15 + [7.9] + [20.0] * 15)) == {15: "low contrast (40% of what is usual around it)"}
    assert judge(measured([20.0] * 15 + [8.1] + [20.0] * 15)) == {}


def test_black_and_white_are_the_ends_of_the_grey_levels() -> None:
    """Shares of what could be read: of two boxes, the second of which could not."""
    voxels = np.full((1, 2, 8, 8), 100, np.float32)
    voxels[0, 0, :2], voxels[0, 0, 2] = 0, 255
    voxels[0, 1] = np.nan
    found = measure(voxels)
    assert (found.black.tolist(), found.white.tolist()) == ([2 / 8], [1 / 8])


@pytest.mark.parametrize("i", [0, 6, 11])
def test_a_shift_is_that_of_the_misplaced_section(i: int) -> None:
    """Whether it is compared with the sections before it or, the first one, with those after it."""
    moved = np.zeros((12, LAGS, 1, 2))
    moved[i] = (8, -3)
    for lag in range(1, LAGS + 1):
        if i + lag < 12:
            moved[i + lag, lag - 1] = (-8, 3)
    assert judge(measured([20.0] * 12, moved=moved), step=2) == {i: "shifted by (16, -6) LR voxels (y, x)"}


def test_quantiles_are_values_that_are_there() -> None:
    """Of 1, 2, 3, 4 the median is 2, the upper quartile 3: at (n - 1) q, rounded down; NaN counts for nothing."""
    values = np.array([[4, np.nan], [1, np.nan], [np.nan, np.nan], [3, np.nan], [2, np.nan]], np.float32)
    for quantile, wanted in ((0, 1), (0.5, 2), (0.75, 3), (1, 4)):
        found = quality._quantile(values, quantile)
        assert found[0] == wanted
        assert np.isnan(found[1])
