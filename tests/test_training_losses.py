"""Each loss against numbers made by hand, and the parts that training is made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.models import vgg
from torchvision.transforms.functional import normalize

from models import deformable
from models.config import X8_SMALL, preset
from models.degrade import degrade
from models.flow import warp
from models.network import SuperResolver
from models.training import losses
from models.training.codes import CodeUsage
from models.training.crops import Augmentation, Crops, Volume, centre_windows, pair
from models.training.loop import LOWEST_RATE, Recipe, decay, learning_rate
from models.training.stages import NetworkStage
from models.training.warps import warped_pair
from models.vqgan import VQGAN, Codebook

E2 = math.e**2


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def test_codebook_loss_and_its_gradients() -> None:
    """Squares 1 and 4, mean 2.5, twice; the rows are drawn to Z_e and Z_e to the rows, each by its own term alone."""
    latent, quantised = column(1, 2).requires_grad_(), column(0, 4).requires_grad_()
    loss = losses.codebook_loss(latent, quantised, beta=0.5)
    assert loss.item() == pytest.approx(2.5 + 0.5 * 2.5)
    loss.backward()
    assert latent.grad.flatten().tolist() == pytest.approx([0.5 * 1, 0.5 * -2])
    assert quantised.grad.flatten().tolist() == pytest.approx([-1, 2])


def test_adversarial_losses() -> None:
    """Plain means: no hinge, no logarithm."""
    assert losses.generator_loss(torch.tensor([1.0, 3.0])).item() == -2
    assert losses.critic_loss(torch.tensor([5.0, 3.0]), torch.tensor([1.0, 2.0])).item() == 0.5 * (1.5 - 4)


def test_r1_penalty() -> None:
    """A score of 3 times the sum has a gradient of 3 in each of four voxels: 36; times 0.1 / 2 * 16."""

    class Three(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * x.sum((1, 2, 3))

    assert losses.r1_penalty(Three(), torch.rand(5, 1, 2, 2), 0.1, 16).item() == pytest.approx(28.8)


def test_index_loss() -> None:
    """Odds of 3 to 1 for the right code: log(4 / 3); for the wrong one: log 4; their mean."""
    logits = torch.tensor([[math.log(3), math.log(3)], [0.0, 0.0]]).view(1, 2, 1, 2)
    assert losses.index_loss(logits, torch.tensor([[[0, 1]]])).item() == pytest.approx(
        (math.log(4 / 3) + math.log(4)) / 2
    )


def test_contextual_loss() -> None:
    """Reference positions at (1, 0) and (-1, 0) from their mean; SR sees one of them exactly and one thing at right angles.

    j = 0 has its like: cx 1, confidence e^2. j = 1 has only the stranger, which is as far from both: cx 1/2, confidence 1.
    """
    mean = torch.tensor([7.0, -3.0]).view(1, 2, 1, 1)
    wanted = mean + torch.tensor([[1.0, -1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    seen = mean + torch.tensor([[2.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    assert losses.contextual_loss(seen, wanted).item() == pytest.approx(-math.log((E2 + 0.5) / (E2 + 1)), abs=1e-4)


def test_reference_loss_is_over_all_references() -> None:
    """The mean over samples and references of the loss of each pair; SR alone is given a gradient."""
    generator = torch.Generator().manual_seed(0)
    layers = {"0": (8, 3), "2": (8, 8), "5": (8, 8), "7": (8, 8), "10": (8, 8), "12": (8, 8), "14": (8, 8)}
    state = {f"features.{i}.weight": torch.randn(*size, 3, 3, generator=generator) / 5 for i, size in layers.items()}
    state |= {f"features.{i}.bias": torch.zeros(size[0]) for i, size in layers.items()}
    features = losses.Features(state)
    sr = torch.rand(2, 1, 32, 32, generator=generator, requires_grad=True)
    references = torch.rand(2, 5, 1, 32, 32, generator=generator, requires_grad=True)
    assert features(sr).shape == (2, 8, 8, 8)
    found = losses.reference_loss(features, sr, references)
    found.backward()
    assert sr.grad is not None
    assert sr.grad.abs().sum() > 0
    assert references.grad is None
    wanted = features(references.flatten(0, 1))
    assert found.item() == pytest.approx(
        losses.contextual_loss(features(sr).repeat_interleave(5, 0), wanted).item(), rel=1e-5
    )
    same = losses.reference_loss(features, sr, sr[:, None].detach().expand(-1, 5, -1, -1, -1))
    assert same.item() < found.item()


def test_cosine_with_restarts() -> None:
    """network.md, section 4: back to the full rate at 40k, 120k, 240k, 360k; each cycle ends near 1e-7."""
    recipe = Recipe(480_000, 8, 4e-4, (40_000, 80_000, 120_000, 120_000, 120_000))
    assert [learning_rate(s, recipe) for s in (0, 40_000, 120_000, 240_000, 360_000)] == [4e-4] * 5
    assert [learning_rate(s, recipe) for s in (39_999, 119_999, 239_999, 479_999)] == pytest.approx(
        [LOWEST_RATE] * 4, abs=1e-8
    )
    assert learning_rate(80_000, recipe) == pytest.approx((4e-4 + 1e-7) / 2)
    assert learning_rate(50, Recipe(100, 1, 1.0)) == pytest.approx(0.5)


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
    """first(x) = second(x + flow(x)): reading the second section along the flow gives the first, up to what stands for other tissue."""
    smooth = np.asarray(Image.fromarray(noise((24, 24))).resize((256, 256), Image.Resampling.BICUBIC))
    hr = torch.stack([torch.from_numpy(smooth.copy()).float().div(255), torch.full((256, 256), 0.5)]).view(
        1, 2, 1, 256, 256
    )
    lr = torch.from_numpy(degrade(smooth, 8).copy()).float().div(255).expand(1, 2, 1, 32, 32)
    first, second, flow = warped_pair(lr, hr, 8, np.random.default_rng(1), shift=16, bend=2)
    assert first.shape == second.shape == (1, 1, 128, 128)
    assert flow.shape == (1, 2, 128, 128)
    inner = (slice(None), slice(None), slice(16, -16), slice(16, -16))
    still = np.corrcoef(first[inner].flatten(), second[inner].flatten())[0, 1]
    moved = np.corrcoef(first[inner].flatten(), warp(second, flow)[inner].flatten())[0, 1]
    assert moved > 0.95 > 0.8 > still


def test_code_usage() -> None:
    """Four codes, used 3, 1, 0, 0 times: half are used; perplexity exp of the entropy of 3/4, 1/4."""
    indices = torch.tensor([0, 0, 1, 0])
    health = CodeUsage.health(indices, 4)
    assert health["codes_used"] == 0.5
    assert health["perplexity"] == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    usage = CodeUsage(4)
    usage.count(indices)
    book = Codebook(preset(8, "small").prior)
    book.weight.data = torch.zeros(4, 2)
    latent = torch.arange(1.0, 9.0).view(1, 2, 2, 2)
    assert usage.revive(book, latent, np.random.default_rng(0)) == 2
    rows = {tuple(row) for row in latent[0].flatten(1).T.tolist()}
    assert book.weight[:2].eq(0).all()
    assert all(tuple(row) in rows for row in book.weight[2:].tolist())
    assert usage.counts.sum() == 0


def test_the_nearest_code_by_hand() -> None:
    """Squared distances of (2, 0) to (0, 0), (3, 0), (0, 1): 4, 1, 5; of (-1, 3): 10, 25, 5."""
    book = Codebook(preset(8, "small").prior)
    book.weight.data = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    latent = torch.tensor([[2.0, -1.0], [0.0, 3.0]]).view(1, 2, 1, 2)
    indices = book.nearest(latent)
    assert indices.tolist() == [[[1, 2]]]
    assert book.lookup(indices)[0, :, 0].T.tolist() == [[3, 0], [0, 1]]


def test_tokens_that_skip_the_codebook() -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(X8_SMALL.prior)
    section = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        whole, latent, _ = vqgan(section)
        none = vqgan(section, torch.zeros(1, 1, 2, 2, dtype=torch.bool))[0]
        assert torch.equal(whole, vqgan(section, torch.ones(1, 1, 2, 2, dtype=torch.bool))[0])
        assert torch.equal(none, vqgan.decoder(latent).image)
    assert not torch.equal(whole, none)


def test_sampling_for_training_is_the_deformable_convolution() -> None:
    """torchvision's numbers and gradients, offsets far beyond the border among them."""
    torch.manual_seed(0)
    conv = deformable.DeformableConv(16, 4)
    nn.init.normal_(conv.offsets.weight, std=0.5)
    x, guide = torch.randn(2, 16, 9, 11, requires_grad=True), torch.randn(2, 16, 9, 11)
    found = []
    for operator in (deformable.by_torchvision, deformable.sampled):
        conv.zero_grad()
        x.grad = None
        out = operator(x, conv.offsets(guide), conv.weight, conv.bias, conv.groups)
        out.square().sum().backward()
        found.append([out.detach(), x.grad.clone(), *(p.grad.clone() for p in conv.parameters())])
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(theirs, ours, atol=1e-4, rtol=1e-3)


def test_all_centres_at_once_are_the_windows_one_by_one() -> None:
    torch.manual_seed(0)
    network = SuperResolver(X8_SMALL)
    sections = torch.rand(2, 7, 1, 8, 12)
    with torch.no_grad():
        sr, references = network(sections, all_centres=True)
        assert sr.shape == (2, 3, 1, 64, 96)
        assert references.shape == (2, 7, 1, 64, 96)
        for i in range(3):
            assert torch.allclose(sr[:, i], network(sections[:, i : i + 5]), atol=1e-5)


def test_alone_every_window_is_its_centre_five_times() -> None:
    torch.manual_seed(0)
    network = SuperResolver(X8_SMALL)
    sections = torch.rand(1, 6, 1, 8, 8)
    with torch.no_grad():
        for parameter in network.reconstruct.parameters():
            parameter.mul_(3)
        sr, _ = network(sections, all_centres=True, alone=True)
        for i in range(2):
            assert torch.allclose(sr[:, i], network(sections[:, i + 2 : i + 3].repeat(1, 5, 1, 1, 1)), atol=1e-5)
            assert not torch.allclose(sr[:, i], network(sections[:, i : i + 5]), atol=1e-5)


def test_squares_take_the_place_of_l1() -> None:
    stage = NetworkStage(X8_SMALL, squares=True)
    answer = torch.tensor([0.5, 0.1]).view(1, 1, 1, 1, 2), torch.zeros(1, 5, 1, 1, 2)
    batch = torch.zeros(1, 5, 1, 1, 1), torch.zeros(1, 5, 1, 1, 2)
    found = stage.losses(lambda lr, **_: answer, None, batch, 0)  # type: ignore[arg-type]
    assert {name: round(float(value), 6) for name, value in found.items()} == {
        "loss": 0.13,
        "l2": 0.13,
    }  # (0.25 + 0.01) / 2


def test_the_average_forgets_the_random_start() -> None:
    recipe = Recipe(steps=10_000, batch=1, average=0.998)
    assert [decay(step, recipe) for step in (0, 8, 9999)] == [0.1, 0.5, 0.998]


@pytest.mark.parametrize(("letter", "layers"), [("D", 16), ("E", 18)])
def test_features_are_those_of_torchvision(letter: str, layers: int) -> None:
    """VGG16 to relu3_3, VGG19 to relu3_4: torchvision's own layers on the image normalised as torchvision says."""
    torch.manual_seed(0)
    theirs = vgg.make_layers(vgg.cfgs[letter])[:layers]
    state = {f"features.{name}": value for name, value in theirs.state_dict().items()}
    image = torch.rand(2, 1, 16, 24)
    normalised = normalize(image.repeat(1, 3, 1, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        found = losses.Features(state)(image)
        assert found.shape == (2, 256, 4, 6)
        assert torch.allclose(found, theirs(normalised), atol=1e-6)


def test_an_encoder_is_its_parts_in_order() -> None:
    """Z_e of eq. 1: a convolution with ReLU, the halvings, attention, three blocks, and one vector per position."""
    torch.manual_seed(0)
    encoder = VQGAN(X8_SMALL.prior).encoder
    section = torch.rand(1, 1, 32, 48)
    with torch.no_grad():
        first = nn.functional.relu(nn.functional.conv2d(section, encoder.input.weight, encoder.input.bias, padding=1))
        x = encoder.body(first)
        assert x.shape[2:] == (2, 3)
        assert torch.allclose(encoder(section), encoder.project(encoder.head(x)), atol=1e-5)
        assert encoder(section).shape == (1, X8_SMALL.prior.code_width, 2, 3)
