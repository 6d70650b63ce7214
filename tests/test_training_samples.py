"""What training is fed: crops, windows, flips and warped pairs of volumes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.degrade import degrade
from models.flow import warp
from models.training.crops import Augmentation, Crops, Volume, centre_windows, pair
from models.training.warps import warped_pair


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def volume(shape: tuple[int, int, int], bad: tuple[int, ...] = ()) -> tuple[Volume, np.ndarray]:
    voxels = noise(shape)
    good = np.ones(shape[0], bool)
    good[list(bad)] = False
    return Volume(shape, lambda z, y, x: voxels[z, y, x], good), voxels


@settings(max_examples=40)
@given(st.data())
def test_the_lr_of_a_crop_is_that_of_the_whole_section(data: st.DataObject) -> None:
    scale = data.draw(st.sampled_from([8, 16]))
    there, voxels = volume((1, 12 * scale, 14 * scale))
    y, x = (data.draw(st.integers(0, n)) * scale for n in (8, 10))
    lr, hr = pair(there, scale, 0, (y, x), (4 * scale, 4 * scale))
    assert np.array_equal(hr, voxels[0, y : y + 4 * scale, x : x + 4 * scale])
    whole = degrade(voxels[0], scale)[y // scale :][:4, x // scale :][:, :4]
    assert np.abs(lr.astype(int) - whole).max() <= 1  # Pillow's fixed-point weights differ by where a crop begins


def test_degrading_is_pillows_antialiased_bicubic() -> None:
    section = noise((64, 96))
    assert np.array_equal(
        degrade(section, 8), np.asarray(Image.fromarray(section).resize((12, 8), Image.Resampling.BICUBIC))
    )


@settings(max_examples=30)
@given(step=st.integers(0, 1000), drift=st.sampled_from([0, 5]))
def test_samples_depend_on_seed_and_step_alone_and_avoid_bad_sections(step: int, drift: int) -> None:
    there, voxels = volume((12, 96, 96), bad=(5,))
    crops = Crops([there], 5, 32, 8, Augmentation(flips=False, drift=drift))
    lr, hr = crops.batch(3, step, 2)
    again = crops.batch(3, step, 2)
    assert torch.equal(lr, again[0])
    assert torch.equal(hr, again[1])
    assert not torch.equal(hr, crops.batch(4, step, 2)[1])
    assert lr.shape == (2, 5, 1, 4, 4)
    assert hr.shape == (2, 5, 1, 32, 32)
    bad = np.lib.stride_tricks.sliding_window_view(voxels[5], (32, 32)).reshape(-1, 1024)[:, :8]
    for section in (hr * 255).round().byte().view(-1, 1024)[:, :8].numpy():
        assert not (bad == section).all(1).any()


def test_flips_and_turns_are_the_same_for_all_sections() -> None:
    ramp = np.broadcast_to(
        np.arange(64, dtype=np.uint8)[None, :, None] * 2 + np.arange(64, dtype=np.uint8), (5, 64, 64)
    ).copy()
    there = Volume(ramp.shape, lambda z, y, x: ramp[z, y, x], np.ones(5, bool))
    crops = Crops([there], 5, 32, 8)
    seen = set()
    for step in range(40):
        _, hr = crops.batch(0, step, 1)
        assert torch.equal(hr, hr[:, :1].expand_as(hr))
        dy, dx = (
            float(hr[0, 0, 0, 1, 0] - hr[0, 0, 0, 0, 0]) * 255,
            float(hr[0, 0, 0, 0, 1] - hr[0, 0, 0, 0, 0]) * 255,
        )
        seen.add((round(dy), round(dx)))
    assert seen == {(2 * a, b) for a in (1, -1) for b in (1, -1)} | {(a, 2 * b) for a in (1, -1) for b in (1, -1)}


def test_validation_windows_are_spread_over_the_sections() -> None:
    there, voxels = volume((20, 100, 130))
    windows = centre_windows(there, 5, 64, 8, 4)
    assert len(windows) == 4
    assert all(lr.shape == (1, 5, 1, 8, 8) and hr.shape == (1, 5, 1, 64, 64) for lr, hr in windows)
    first = (windows[0][1][0, 0, 0] * 255).round().byte().numpy()
    assert np.array_equal(first, voxels[0, 16:80, 32:96])


def test_a_warped_pair_is_undone_by_its_flow() -> None:
    """first(x) = second(x + flow(x)): reading the second section along the flow gives the first, up to what stands for
    other tissue.
    """
    smooth = np.asarray(Image.fromarray(noise((24, 24))).resize((256, 256), Image.Resampling.BICUBIC))
    hr = torch.stack([torch.from_numpy(smooth.copy()).float().div(255), torch.full((256, 256), 0.5)]).view(
        1, 2, 1, 256, 256
    )
    lr = torch.from_numpy(degrade(smooth, 8).copy()).float().div(255).expand(1, 2, 1, 32, 32)
    first, second, flow = warped_pair(lr, hr, np.random.default_rng(1), shift=16, bend=2)
    assert first.shape == second.shape == (1, 1, 128, 128)
    assert flow.shape == (1, 2, 128, 128)
    inner = (slice(None), slice(None), slice(16, -16), slice(16, -16))
    still = np.corrcoef(first[inner].flatten(), second[inner].flatten())[0, 1]
    moved = np.corrcoef(first[inner].flatten(), warp(second, flow)[inner].flatten())[0, 1]
    assert moved > 0.95 > 0.8 > still
