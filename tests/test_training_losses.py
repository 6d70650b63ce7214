"""Each loss against numbers made by hand, and the parts that training is made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from test_training_samples import volume
from torch import nn
from torch.nn import functional
from torchvision.models import vgg
from torchvision.ops import deform_conv2d
from torchvision.transforms.functional import normalize

from models import deformable
from models.config import X8, X8_SMALL, preset
from models.discriminator import Discriminator
from models.layers import Residual
from models.network import SuperResolver
from models.training import losses
from models.training.codes import CodeUsage
from models.training.crops import Crops
from models.training.loop import MIN_RATE, Loop, Progress, Recipe, decay, learning_rate
from models.training.stages import NetworkStage, VQGANStage
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


def test_r1_penalty_teaches_the_critic() -> None:
    """A score of w times the sum: the penalty is 0.8 * 4 w^2, so its derivative at w = 3 is 19.2."""
    critic = nn.Conv2d(1, 1, 2, bias=False)
    nn.init.constant_(critic.weight, 3.0)
    losses.r1_penalty(critic, torch.rand(5, 1, 2, 2), 0.1, 16).backward()
    assert critic.weight.grad is not None
    assert critic.weight.grad.sum().item() == pytest.approx(4 * 0.8 * 2 * 3)


def test_index_loss() -> None:
    """Odds of 3 to 1 for the right code: log(4 / 3); for the wrong one: log 4; their mean."""
    logits = torch.tensor([[math.log(3), math.log(3)], [0.0, 0.0]]).view(1, 2, 1, 2)
    assert losses.index_loss(logits, torch.tensor([[[0, 1]]])).item() == pytest.approx(
        (math.log(4 / 3) + math.log(4)) / 2
    )


def test_contextual_loss() -> None:
    """Reference positions at (1, 0) and (-1, 0) from their mean; SR sees one of them exactly and one thing at right
    angles.

    j = 0 has its like: cx 1, confidence e^2. j = 1 has only the stranger, which is as far from both: cx 1/2, confidence
    1.
    """
    mean = torch.tensor([7.0, -3.0]).view(1, 2, 1, 1)
    wanted = mean + torch.tensor([[1.0, -1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    seen = mean + torch.tensor([[2.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    assert losses.contextual_loss(seen, wanted).item() == pytest.approx(-math.log((E2 + 0.5) / (E2 + 1)), abs=1e-4)


def test_contextual_loss_as_network_md_writes_it() -> None:
    """Section 4's formula, sample by sample and position by position, on two samples whose means differ."""
    rng = np.random.default_rng(2)
    sr, reference = rng.normal(0, 1, (2, 3, 5)), rng.normal(0, 1, (2, 3, 5)) + np.array([0.0, 4.0])[:, None, None]
    reference[0, :, 1] = sr[0, :, 2]
    mean = reference.mean((0, 2))
    found = []
    for one, other in zip(sr, reference, strict=True):
        a, b = ([column - mean for column in image.T] for image in (one, other))
        d = np.array([[max(0, 1 - x @ y / np.sqrt((x @ x) * (y @ y))) for y in b] for x in a])
        w = np.array([np.exp((1 - row / (row.min() + 1e-5)) / 0.5) for row in d])
        cx = np.array([row / (row.sum() + 1e-5) for row in w])
        best = cx.argmax(0)
        c = np.exp((1 - d[best, range(5)]) / 0.5)
        found.append(-np.log((cx.max(0) * c).sum() / c.sum() + 1e-5))
    ours = losses.contextual_loss(*(torch.from_numpy(x).view(2, 3, 1, 5) for x in (sr, reference)))
    assert ours.item() == pytest.approx(np.mean(found), rel=1e-6)


@pytest.mark.parametrize(("name", "places"), [("E", 18), ("D", 16)])
def test_features_are_torchvisions_layers(name: str, places: int) -> None:
    """VGG19 (E) to relu3_4 and VGG16 (D) to relu3_3, of a grey image as three channels normalised as ImageNet's
    were.
    """
    torch.manual_seed(0)
    layers = vgg.make_layers(vgg.cfgs[name])[:places]
    image = torch.rand(2, 1, 16, 24)
    with torch.no_grad():
        found = losses.Features({f"features.{key}": value for key, value in layers.state_dict().items()})(image)
        wanted = layers(normalize(image.expand(-1, 3, -1, -1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert found.shape == (2, 256, 4, 6)
    assert torch.allclose(found, wanted, atol=1e-6)


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
        [MIN_RATE] * 4, abs=1e-8
    )
    assert learning_rate(80_000, recipe) == pytest.approx((4e-4 + 1e-7) / 2)
    assert learning_rate(50, Recipe(100, 1, 1.0)) == pytest.approx(0.5)


def trained(stage: VQGANStage, recipe: Recipe, crops: Crops) -> list[tuple[float, float]]:
    """The learning rates of network and critic after every step; the critic's is NaN as long as it has not begun."""
    loop, rates = Loop(Fabric(accelerator="cpu", devices=1), stage, recipe), []

    def note(progress: Progress) -> None:
        critic = math.nan if loop.critic_started is None else loop.critic_adam.param_groups[0]["lr"]
        rates.append((loop.adam.param_groups[0]["lr"], critic))

    loop.run(crops, [], lambda *_: None, note)
    return rates


@pytest.mark.parametrize("periods", [(), (4,)])
def test_the_critics_cosine_begins_with_the_critic(periods: tuple[int, ...]) -> None:
    """network.md, section 4: the discriminator's schedule steps only while the GAN is on, so its cosine runs as many
    steps late as the GAN begins late: full rate then, where the network's is already lower.
    """
    stage = VQGANStage(X8_SMALL, adversarial_from=3, critic_width=2)
    recipe = Recipe(6, 1, 1e-3, periods)
    network, critic = zip(*trained(stage, recipe, Crops([volume((3, 96, 96))[0]], 1, 96, 8)), strict=True)

    def cosine(step: int, period: int) -> float:
        return MIN_RATE + (1e-3 - MIN_RATE) * (1 + math.cos(math.pi * step / period)) / 2

    own, late = (4, 4) if periods else (6, 3)  # without periods: one cycle over all steps that are left
    assert network == pytest.approx([cosine(step % own, own) for step in range(6)])
    assert critic == pytest.approx([math.nan] * 3 + [cosine(step, late) for step in range(3)], nan_ok=True)


def test_the_vqgan_stage_adds_up_its_losses() -> None:
    """L1 + 10 * codebook, and 0.05 * GAN from its first step on; the critic's R1 only at multiples of 16."""
    torch.manual_seed(0)
    stage = VQGANStage(X8_SMALL, adversarial_from=31, critic_width=2)
    batch = torch.zeros(1, 1, 1, 12, 12), torch.rand(1, 1, 1, 96, 96)
    assert stage.critic is not None
    for step, gan, r1 in ((30, False, False), (31, True, False), (32, True, True)):
        found = stage.losses(stage.network, stage.critic, stage.draw(batch, step), step)
        total = found["l1"] + 10 * found["codebook"] + (0.05 * found["generator"] if gan else 0)
        assert found["loss"].item() == pytest.approx(total.item())
        assert ("generator" in found) == gan
        of_critic = stage.critic_losses(stage.critic, step)
        assert (of_critic is not None) == gan
        assert ("r1" in (of_critic or {})) == r1
        if r1:
            assert of_critic["critic_loss"].item() == pytest.approx((of_critic["critic"] + of_critic["r1"]).item())


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
    assert usage.revive(book, latent, np.random.default_rng(0)).tolist() == [2, 3]
    rows = {tuple(row) for row in latent[0].flatten(1).T.tolist()}
    assert book.weight[:2].eq(0).all()
    assert all(tuple(row) in rows for row in book.weight[2:].tolist())
    assert usage.counts.sum() == 0


def test_the_codebook_starts_uniform_within_one_over_its_rows() -> None:
    """network.md, section 2: +-1/v. A uniform distribution of that width deviates by 1 / (v * sqrt(3))."""
    torch.manual_seed(0)
    weight = Codebook(X8.prior).weight.detach() * 1024
    assert weight.shape == (1024, 512)
    assert -1 <= weight.min() < -0.999
    assert 0.999 < weight.max() <= 1
    assert abs(weight.mean()) < 0.005
    assert weight.std() == pytest.approx(3**-0.5, rel=0.005)


def test_the_nearest_row_is_that_of_the_least_distance() -> None:
    torch.manual_seed(0)
    book = Codebook(X8_SMALL.prior)
    nn.init.normal_(book.weight)
    latent = torch.randn(2, 128, 3, 4)
    distances = torch.cdist(latent.permute(0, 2, 3, 1).reshape(-1, 128).double(), book.weight.double())
    assert torch.equal(book.nearest(latent), distances.argmin(1).view(2, 3, 4))
    assert torch.equal(book.lookup(book.nearest(latent))[1, :, 2, 3], book.weight[distances.argmin(1)[-1]])


def test_gradients_pass_the_codebook_straight_through() -> None:
    """Section 3.5 of the paper: the decoder's gradient at Z_d is the encoder's at Z_e, and moves no row of the
    codebook.
    """
    torch.manual_seed(0)
    vqgan = VQGAN(X8_SMALL.prior)
    nn.init.normal_(vqgan.codebook.weight)  # rows far from Z_e, so that a decoder given Z_e shows
    image, latent, quantised = vqgan(torch.rand(1, 1, 32, 32))
    at_latent, at_rows = torch.autograd.grad(
        image.square().sum(), (latent, vqgan.codebook.weight), allow_unused=True, materialize_grads=False
    )
    row = quantised.detach().requires_grad_()
    again = vqgan.decoder(row).image
    (wanted,) = torch.autograd.grad(again.square().sum(), row)
    assert torch.allclose(image, again, atol=1e-5)
    assert wanted.abs().sum() > 0
    assert torch.allclose(at_latent, wanted, rtol=1e-3, atol=1e-5)
    assert at_rows is None


def test_the_encoder_layer_by_layer() -> None:
    """network.md, sections 1 and 2, written out over the encoder's own weights: no reference vector reaches it."""
    torch.manual_seed(0)
    encoder = VQGAN(X8_SMALL.prior).encoder
    state = encoder.state_dict()

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.group_norm(x, 8, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def residual(x: torch.Tensor, name: str) -> torch.Tensor:
        y = norm(conv(x, f"{name}.conv1"), f"{name}.norm1").relu()
        return x + norm(conv(y, f"{name}.conv2"), f"{name}.norm2").relu()

    def attention(x: torch.Tensor, name: str) -> torch.Tensor:
        q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{part}").flatten(2) for part in "qkv")
        share = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(2)
        return x + conv((v @ share.transpose(1, 2)).view_as(x), f"{name}.project")

    section = torch.rand(1, 1, 64, 48)
    x = conv(section, "input").relu()
    for level in range(4):
        x = conv(residual(x, f"body.{2 * level}"), f"body.{2 * level + 1}", stride=2)
    x = attention(x, "body.8")
    for block in range(3):
        x = residual(x, f"head.{block}")
    assert torch.allclose(encoder(section), conv(x, "project"), atol=1e-5)


def test_the_discriminator_layer_by_layer() -> None:
    """network.md, section 2: slope 0.2, instance norm without weights, no padding anywhere."""
    torch.manual_seed(0)
    critic = Discriminator(2)
    weights = [(conv.weight, conv.bias) for conv in critic.model if isinstance(conv, nn.Conv2d)]
    section = torch.rand(2, 1, 96, 80)
    x = functional.leaky_relu(functional.conv2d(section, *weights[0], stride=2), 0.2)
    for (weight, bias), stride in zip(weights[1:4], (2, 2, 1), strict=True):
        assert bias is None
        x = functional.leaky_relu(functional.instance_norm(functional.conv2d(x, weight, stride=stride)), 0.2)
    assert torch.allclose(critic(section), functional.conv2d(x, *weights[4]), atol=1e-5)
    assert Discriminator(2)(torch.rand(1, 1, 512, 512)).shape == (1, 1, 56, 56)


def test_how_residual_blocks_and_deformable_convolutions_start() -> None:
    """network.md, section 1: Kaiming-normal times 0.1 and no bias, and a deformable convolution that moves no tap: half
    of a plain one with weights uniform in +-1/sqrt(9 C).
    """
    torch.manual_seed(0)
    block = Residual(64)
    for conv in (block.conv1, block.conv2):
        assert conv.weight.std().item() == pytest.approx(0.1 * (2 / (9 * 64)) ** 0.5, rel=0.02)
        assert conv.bias.eq(0).all()
    conv = deformable.DeformableConv(64, 8)
    assert 0.999 < conv.weight.abs().max() * 24 <= 1
    assert conv.weight.std().item() == pytest.approx(1 / 24 / 3**0.5, rel=0.02)
    x = torch.randn(1, 64, 6, 7)
    with torch.no_grad():
        wanted = functional.conv2d(x, conv.weight / 2, padding=1)
        assert torch.allclose(conv(x, torch.randn(1, 64, 6, 7)), wanted, atol=1e-5)


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


def by_torchvision(x: torch.Tensor, head: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> Any:
    moved = 2 * deformable.TAPS * groups
    return deform_conv2d(x, head[:, :moved], weight, bias, padding=1, mask=torch.sigmoid(head[:, moved:]))


def test_sampling_is_the_deformable_convolution() -> None:
    """torchvision's numbers and gradients, offsets far beyond the border among them; and without gradients, on a CPU
    as on a GPU, its numbers.
    """
    torch.manual_seed(0)
    conv = deformable.DeformableConv(16, 4)
    nn.init.normal_(conv.offsets.weight, std=0.5)
    x, guide = torch.randn(2, 16, 9, 11, requires_grad=True), torch.randn(2, 16, 9, 11)
    found = []
    for operator in (by_torchvision, deformable.sampled):
        conv.zero_grad()
        x.grad = None
        out = operator(x, conv.offsets(guide), conv.weight, conv.bias, conv.groups)
        out.square().sum().backward()
        found.append([out.detach(), x.grad.clone(), *(p.grad.clone() for p in conv.parameters())])
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(theirs, ours, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert torch.allclose(conv(x, guide), found[0][0], atol=1e-4)
        sampled = deformable.sampled(x, conv.offsets(guide), conv.weight, conv.bias, conv.groups)
        assert torch.allclose(sampled, found[0][0], atol=1e-4)


def network_whose_windows_matter() -> SuperResolver:
    """Random weights with which neighbours move the taps of deformable convolutions, and the residual is seen in SR."""
    torch.manual_seed(0)
    network = SuperResolver(X8_SMALL)
    with torch.no_grad():
        for parameter in network.reconstruct.parameters():
            parameter.mul_(3)
        for module in network.modules():
            if isinstance(module, deformable.DeformableConv):
                nn.init.normal_(module.offsets.weight, std=0.2)
    return network


def test_all_centres_at_once_are_the_windows_one_by_one() -> None:
    network = network_whose_windows_matter()
    sections = torch.rand(2, 7, 1, 8, 12)
    with torch.no_grad():
        sr, references = network(sections, all_centres=True)
        assert sr.shape == (2, 3, 1, 64, 96)
        assert references.shape == (2, 7, 1, 64, 96)
        for i in range(3):
            assert torch.allclose(sr[:, i], network(sections[:, i : i + 5]), atol=1e-5)


def test_alone_every_window_is_its_centre_five_times() -> None:
    network = network_whose_windows_matter()
    sections = torch.rand(1, 6, 1, 8, 8)
    with torch.no_grad():
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
