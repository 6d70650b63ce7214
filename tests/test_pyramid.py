"""A pyramid level is the 2x2 mean rounded half up, at even and odd edges, and carries no bias down the levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.storage.volume import Uint8Array
from pipeline.worker import pyramid
from pipeline.worker.pyramid import halve


def reference(voxels: Uint8Array) -> Uint8Array:
    """The same in float64, from the definition."""
    _, y, x = voxels.shape
    even = np.pad(voxels.astype(np.float64), ((0, 0), (0, y % 2), (0, x % 2)), mode="edge")
    mean = (even[:, 0::2, 0::2] + even[:, 1::2, 0::2] + even[:, 0::2, 1::2] + even[:, 1::2, 1::2]) / 4
    return np.floor(mean + 0.5).astype(np.uint8)


@given(arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40))))
def test_equals_the_float_mean_rounded_half_up(voxels: Uint8Array) -> None:
    assert np.array_equal(halve(voxels), reference(voxels))


@settings(max_examples=20)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([2, 64, 1000]))
def test_the_blocks_do_not_show(y: int, x: int, block: int) -> None:
    voxels = np.random.default_rng(y * 1000 + x).integers(0, 256, (2, y, x), dtype=np.uint8)
    usual = pyramid._BLOCK_VOXELS
    try:
        pyramid._BLOCK_VOXELS = block
        small = halve(voxels)
    finally:
        pyramid._BLOCK_VOXELS = usual
    assert np.array_equal(small, reference(voxels))
    assert np.array_equal(halve(voxels), small)


def test_numbers_worked_out_by_hand() -> None:
    voxels = np.array([[[0, 1, 255], [1, 0, 254], [9, 10, 7]]], np.uint8)
    # (0+1+1+0)/4 = 0.5 -> 1; (255+254)/2 = 254.5 -> 255; (9+10)/2 = 9.5 -> 10; 7
    assert halve(voxels).tolist() == [[[1, 255], [10, 7]]]


def test_strided_views_and_read_only_arrays_are_taken() -> None:
    voxels = np.random.default_rng(0).integers(0, 256, (4, 30, 50), dtype=np.uint8)
    voxels.setflags(write=False)
    view = voxels[::2, 3:, ::3]
    assert np.array_equal(halve(view), reference(view))
    assert np.array_equal(halve(voxels.transpose(2, 0, 1)), reference(voxels.transpose(2, 0, 1)))


def test_rounding_half_up_adds_an_eighth_of_a_grey_level_per_level() -> None:
    """Of the four remainders of a sum by 4, one is a half rounded up: a bias of 1/8, not the 3/8 of truncation."""
    voxels = np.random.default_rng(1).integers(0, 256, (1, 1024, 1024), dtype=np.uint8)
    level, mean = voxels, float(voxels.mean())
    for k in range(1, 5):
        level = halve(level)
        assert abs(float(level.mean()) - mean - k / 8) < 0.05


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_stays_empty(shape: tuple[int, int, int]) -> None:
    assert halve(np.zeros(shape, np.uint8)).size == 0


def test_refuses_what_is_not_a_uint8_volume() -> None:
    with pytest.raises(ValueError, match="uint8"):
        halve(np.zeros((1, 2, 2), np.uint16))
    with pytest.raises(ValueError, match=r"\(z, y, x\)"):
        halve(np.zeros((2, 2), np.uint8))
