"""The contact sheet: a PNG whose panels show the LR voxels and SR voxels they say they show."""

from __future__ import annotations

import io

import numpy as np
import pytest
from conftest import texture
from PIL import Image

from pipeline.viewer.contact_sheet import CAPTION, GAP, contact_sheet


def opened(data: bytes) -> np.ndarray:
    assert data.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def panel(sheet: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
    top, left = GAP + row * (CAPTION + height + GAP) + CAPTION, GAP + column * (width + GAP)
    return sheet[top : top + height, left : left + width]


def test_panels_hold_the_voxels() -> None:
    lr = texture((2, 6, 10))
    sr = texture((2, 48, 80), seed=1)
    sheet = opened(contact_sheet([(lr[0], sr[0]), (lr[1], sr[1])], 8, ["z 0", "z 1"]))
    assert sheet.shape == (GAP + 2 * (CAPTION + 48 + GAP), GAP + 2 * (80 + GAP), 3)
    for row in range(2):
        assert np.array_equal(panel(sheet, row, 0, 48, 80)[..., 1], np.kron(lr[row], np.ones((8, 8), np.uint8)))
        assert np.array_equal(panel(sheet, row, 1, 48, 80)[..., 1], sr[row])
    assert (sheet[:GAP] == 255).all()
    assert (sheet[GAP : GAP + CAPTION] < 100).any()


@pytest.mark.parametrize("scale", [8, 16])
def test_centre_of_a_large_section_within_1600_pixels(scale: int) -> None:
    side = 100
    lr, sr = texture((1, side, side))[0], np.tile(texture((1, side, side))[0], (scale, scale))
    sheet = opened(contact_sheet([(lr, sr)], scale, ["a label far too long for its place " * 9], [lr]))
    assert sheet.shape[1] == GAP + 3 * (512 + GAP) <= 1600
    k = 512 // scale
    first = (side - k) // 2
    assert np.array_equal(panel(sheet, 0, 0, 512, 512)[::scale, ::scale, 0], lr[first : first + k, first : first + k])
    assert np.array_equal(panel(sheet, 0, 1, 512, 512)[..., 0], sr[first * scale :, first * scale :][:512, :512])


def test_heat_map_is_dark_where_fidelity_is_low() -> None:
    lr, sr = texture((1, 4, 4))[0], texture((1, 32, 32))[0]
    fidelity = np.zeros((4, 4), np.uint8)
    fidelity[:, 2:] = 255
    for plane in (fidelity, fidelity.repeat(8, 0).repeat(8, 1)):
        heat = panel(opened(contact_sheet([(lr, sr)], 8, fidelity=[plane])), 0, 2, 32, 32)
        assert (heat[:, :16] == (68, 1, 84)).all()
        assert (heat[:, 16:] == (253, 231, 37)).all()


def test_first_middle_and_last_of_many() -> None:
    lr, sr = texture((7, 4, 4)), texture((7, 32, 32), seed=1)
    sheet = opened(contact_sheet(list(zip(lr, sr, strict=True)), 8, [str(z) for z in range(7)]))
    assert sheet.shape[0] == GAP + 3 * (CAPTION + 32 + GAP)
    for row, z in enumerate((0, 3, 6)):
        assert np.array_equal(panel(sheet, row, 1, 32, 32)[..., 0], sr[z])


def test_shapes_that_do_not_go_together() -> None:
    lr, sr = texture((1, 4, 4))[0], texture((1, 32, 32))[0]
    for pairs, labels, fidelity in (
        ([], (), ()),
        ([(lr, sr[:30])], (), ()),
        ([(lr, sr)], ("a", "b"), ()),
        ([(lr, sr)], (), [sr[:9]]),
    ):
        with pytest.raises(ValueError, match=r"pair|together|labels|neither"):
            contact_sheet(pairs, 8, labels, fidelity)
