"""The four stages of training: the network of each, its samples, its loss and its scores. `loop` runs any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import Params
from models.discriminator import Discriminator
from models.flow import SPyNet
from models.indexer import Indexer
from models.network import SuperResolver
from models.training.ahead import Drawn
from models.training.codes import CodeUsage
from models.training.losses import codebook_loss, critic_loss, generator_loss, index_loss, r1_penalty, reference_loss
from models.training.ranks import ALONE, Ranks
from models.training.warps import endpoint_error, warped_pair
from models.vqgan import VQGAN

Batch = tuple[Tensor, Tensor]
"""LR (B, N, 1, h, w) and HR (B, N, 1, H, W) of N consecutive sections, in 0..1."""
Losses = dict[str, Tensor]
"""Losses by name: `loss` is minimised, the others are its parts, without their weights, and are only reported."""
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""A distance of images such as LPIPS: two (B, 1, H, W) -> (B,)."""


class Stage(Protocol):
    """What the loop asks of a stage.

    `network` is trained, and so is `critic`, the discriminator, where there is one. A sample has `sections` consecutive
    sections, a validation window `validated` ones. `better` names the scores whose best weights are kept: 1 where a
    larger score is better, -1 where a smaller one is. `ranks` are the processes that train it together.
    """

    network: nn.Module
    critic: nn.Module | None
    sections: int
    validated: int
    better: dict[str, int]
    ranks: Ranks

    def helpers(self) -> list[nn.Module]:
        """Frozen networks that losses and scores use beside `network`."""
        ...

    def draw(self, batch: Batch, step: int) -> Drawn:
        """What `losses` takes in this step: LR and HR, or what is made of them, with all that is drawn at random. On
        the host, in another thread than the steps, and before the steps before are done.
        """
        ...

    def losses(self, network: nn.Module, critic: nn.Module | None, drawn: Drawn, step: int) -> Losses:
        """The network's losses for what `draw` has drawn."""
        ...

    def critic_losses(self, critic: nn.Module, step: int) -> Losses | None:
        """The critic's `critic_loss` and its parts for the last batch of `losses`; None before it is trained."""
        ...

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Called once the weights have been updated. Returns the rows that the stage itself has set anew, by the name
        of their parameter.
        """
        ...

    def validate(self, network: nn.Module, windows: Iterable[Batch]) -> tuple[dict[str, float], list[Tensor]]:
        """Mean scores over windows, and one image (1, H, W) of each window to look at."""
        ...


@dataclass
class FlowStage:
    """Stage flow: SPyNet learns from sections that were warped by a known flow. Its published weights may not be passed
    on.

    `shift` and `bend` are in HR voxels (see `warped_pair`).
    """

    params: Params
    shift: float = 16.0
    bend: float = 4.0
    seed: int = 0
    sections: int = 2
    validated: int = 2
    critic: nn.Module | None = None
    better: dict[str, int] = field(default_factory=lambda: {"endpoint_error": -1})
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.network: nn.Module = SPyNet(self.params.flow_widths, self.params.flow_levels)

    def helpers(self) -> list[nn.Module]:
        return []

    def draw(self, batch: Batch, step: int) -> Drawn:
        """First and second image, and the flow between them (`warped_pair`)."""
        own = [self.ranks.rank] if self.ranks.rank else []
        return warped_pair(*batch, np.random.default_rng([self.seed, step, 1, *own]), self.shift, self.bend)

    def losses(self, network: nn.Module, critic: nn.Module | None, drawn: Drawn, step: int) -> Losses:
        first, second, flow = drawn
        return {"loss": endpoint_error(network(first, second), flow)}

    def critic_losses(self, critic: nn.Module, step: int) -> Losses | None:
        return None

    def after_step(self, step: int) -> dict[str, Tensor]:
        return {}

    def validate(self, network: nn.Module, windows: Iterable[Batch]) -> tuple[dict[str, float], list[Tensor]]:
        found, still = [], []
        for i, (lr, hr) in enumerate(windows):
            drawn = warped_pair(lr.cpu(), hr.cpu(), np.random.default_rng([self.seed, i, 2]), self.shift, self.bend)
            first, second, flow = (part.to(lr.device) for part in drawn)
            found.append(float(endpoint_error(network(first, second), flow)))
            still.append(float(endpoint_error(torch.zeros_like(flow), flow)))
        return {"endpoint_error": float(np.mean(found)), "endpoint_error_of_no_flow": float(np.mean(still))}, []


@dataclass
class VQGANStage:
    """Stage I, eqs. 5 and 6: L1 + codebook_weight * L_c, and + adversarial * L_adv from step `adversarial_from` on. The
    discriminator has R1 regularisation of weight `r1` in every `r1_every`-th step.

    Until step `quantise_from` the network is a plain autoencoder. Then all rows of the codebook are set to outputs of
    the encoder, and over as many steps again a growing share of the tokens is quantised. This keeps the codebook from
    collapsing, all rows near zero, in short runs. In every `revive_every`-th step the rows that no token used since are
    set to outputs of the encoder.
    """

    params: Params
    codebook_weight: float = 10.0
    adversarial: float = 0.05
    adversarial_from: int = 40_000
    r1: float = 1e-4
    r1_every: int = 16
    perceptual_weight: float = 0.0
    perceptual: Perceptual | None = None
    quantise_from: int = 0
    revive_every: int = 0
    critic_width: int = 64
    seed: int = 0
    sections: int = 1
    validated: int = 1
    better: dict[str, int] = field(default_factory=lambda: {"psnr": 1, "lpips": -1})
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.network: nn.Module = VQGAN(self.params.prior)
        self.critic: nn.Module | None = Discriminator(self.critic_width) if self.adversarial else None
        self.usage = CodeUsage(self.params.prior.codes)
        self._real_and_fake: tuple[Tensor, Tensor] | None = None
        self._latent: Tensor | None = None

    def helpers(self) -> list[nn.Module]:
        return _modules(self.perceptual)

    def draw(self, batch: Batch, step: int) -> Drawn:
        """HR as (B, 1, H, W), and which tokens are quantised, (B, 1, h, w): a share of them, drawn anew in each step;
        nothing once all are. All ranks draw those of all samples of the step, and each takes its own.
        """
        real, share = batch[1].flatten(0, 1), self._quantised(step)
        if share >= 1:
            return (real,)
        b, _, h, w = real.shape
        patch, first = self.params.prior.patch, self.ranks.rank * b
        size = (self.ranks.count * b, 1, h // patch, w // patch)
        drawn = np.random.default_rng([self.seed, step, 4]).random(size)[first : first + b] < share
        return real, torch.from_numpy(drawn)

    def _quantised(self, step: int) -> float:
        """The share of tokens that is quantised; 0 or less before any is."""
        return 1.0 if not self.quantise_from else min(1.0, step / self.quantise_from - 1)

    def losses(self, network: nn.Module, critic: nn.Module | None, drawn: Drawn, step: int) -> Losses:
        real = drawn[0]
        image, latent, quantised = network(*drawn)
        parts = {"l1": functional.l1_loss(image, real)}
        loss = parts["l1"]
        if self._quantised(step) > 0:
            parts["codebook"] = codebook_loss(latent, quantised)
            loss = loss + self.codebook_weight * parts["codebook"]
        if self.perceptual is not None and self.perceptual_weight:
            parts["perceptual"] = self.perceptual(image, real).mean()
            loss = loss + self.perceptual_weight * parts["perceptual"]
        self._real_and_fake = None
        if critic is not None and step >= self.adversarial_from:
            critic.requires_grad_(False)
            parts["generator"] = generator_loss(critic(image))
            critic.requires_grad_(True)
            loss = loss + self.adversarial * parts["generator"]
            self._real_and_fake = real, image.detach()
        self._latent = latent.detach()
        return {"loss": loss, **parts}

    def critic_losses(self, critic: nn.Module, step: int) -> Losses | None:
        if self._real_and_fake is None:
            return None
        real, fake = self._real_and_fake
        parts = {"critic": critic_loss(critic(real), critic(fake))}
        loss = parts["critic"]
        if step % self.r1_every == 0:
            parts["r1"] = r1_penalty(critic, real, self.r1, self.r1_every)
            loss = loss + parts["r1"]
        return {"critic_loss": loss, **parts}

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Count the codes of the step's Z_e (B, d, h, w); in the steps for it, set unused rows to columns of Z_e."""
        assert self._latent is not None
        latent, codebook = self._latent, cast(VQGAN, self.network).codebook
        self.usage.count(codebook.nearest(latent), self.ranks)
        if step == self.quantise_from - 1:
            self.usage.counts.zero_()  # so that all rows count as unused, and move
        if step == self.quantise_from - 1 or (self.revive_every and (step + 1) % self.revive_every == 0):
            rng = np.random.default_rng([self.seed, step, 3])
            return {"codebook.weight": self.usage.revive(codebook, latent, rng, self.ranks)}
        return {}

    def validate(self, network: nn.Module, windows: Iterable[Batch]) -> tuple[dict[str, float], list[Tensor]]:
        images, scores, seen = [], [], []
        vqgan = cast(VQGAN, getattr(network, "module", network))
        for _, hr in windows:
            real = hr.flatten(0, 1)
            image, latent, _ = vqgan(real)
            seen.append(vqgan.codebook.nearest(latent).flatten())
            scores.append(image_scores(image, real, self.perceptual))
            images.append(torch.cat([real, image.clamp(0, 1)], 3)[0])
        return mean_scores(scores) | CodeUsage.health(torch.cat(seen), self.params.prior.codes), images


@dataclass
class IndexerStage:
    """Stage II, eq. 7: the indexer's logits for the LR section against the codes that the frozen encoder and codebook
    give for the HR section.
    """

    params: Params
    vqgan: VQGAN
    sections: int = 1
    validated: int = 1
    critic: nn.Module | None = None
    better: dict[str, int] = field(default_factory=lambda: {"cross_entropy": -1, "psnr": 1})
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.network: nn.Module = Indexer(self.params.prior, self.params.scale)
        self.vqgan.requires_grad_(False)

    def helpers(self) -> list[nn.Module]:
        return [self.vqgan]

    def draw(self, batch: Batch, step: int) -> Drawn:
        return batch

    def losses(self, network: nn.Module, critic: nn.Module | None, drawn: Drawn, step: int) -> Losses:
        lr, hr = (part.flatten(0, 1) for part in drawn)
        logits = network(lr)
        indices = self._indices(hr)
        return {"loss": index_loss(logits, indices), "right": (logits.argmax(1) == indices).float().mean()}

    def critic_losses(self, critic: nn.Module, step: int) -> Losses | None:
        return None

    def after_step(self, step: int) -> dict[str, Tensor]:
        return {}

    def _indices(self, hr: Tensor) -> Tensor:
        with torch.no_grad():
            return self.vqgan.codebook.nearest(self.vqgan.encoder(hr))

    def validate(self, network: nn.Module, windows: Iterable[Batch]) -> tuple[dict[str, float], list[Tensor]]:
        images, scores = [], []
        for window in windows:
            lr, hr = (part.flatten(0, 1) for part in window)
            logits, indices = network(lr), self._indices(hr)
            reference = self.vqgan.decoder(self.vqgan.codebook.lookup(logits.argmax(1))).image
            right = float((logits.argmax(1) == indices).float().mean())
            own = {"cross_entropy": float(index_loss(logits, indices)), "right": right}
            scores.append(own | image_scores(reference, hr, None))
            images.append(torch.cat([hr, reference.clamp(0, 1)], 3)[0])
        return mean_scores(scores), images


@dataclass
class NetworkStage:
    """Stage III, eq. 8: L1 + reference_weight * multi-reference fidelity. Prior, mask features and flow are frozen.

    `centres` consecutive centre sections are trained at once; they share the encoding of the sections between them.
    `squares` replaces L1 by the mean squared error. `alone` fills every window with its centre section. `features`
    gives the features that the multi-reference fidelity compares (`losses.Features`).
    """

    params: Params
    centres: int = 1
    squares: bool = False
    alone: bool = False
    reference_weight: float = 0.0
    features: nn.Module | None = None
    perceptual_weight: float = 0.0
    perceptual: Perceptual | None = None
    critic: nn.Module | None = None
    better: dict[str, int] = field(default_factory=lambda: {"psnr": 1, "lpips": -1})
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.network: nn.Module = SuperResolver(self.params)
        self.sections, self.validated = self.params.window + self.centres - 1, self.params.window

    def helpers(self) -> list[nn.Module]:
        return _modules(self.features, self.perceptual)

    def draw(self, batch: Batch, step: int) -> Drawn:
        return batch

    def losses(self, network: nn.Module, critic: nn.Module | None, drawn: Drawn, step: int) -> Losses:
        lr, hr = drawn
        half = self.params.window // 2
        sr, references = network(lr, all_centres=True, alone=self.alone)
        wanted = hr[:, half : half + self.centres]
        parts = {"l2": functional.mse_loss(sr, wanted)} if self.squares else {"l1": functional.l1_loss(sr, wanted)}
        loss = parts["l2" if self.squares else "l1"]
        if self.features is not None and self.reference_weight:
            windows = [references[:, i : i + 2 * half + 1] for i in range(self.centres)]
            per_centre = [reference_loss(self.features, sr[:, i], window) for i, window in enumerate(windows)]
            parts["reference"] = torch.stack(per_centre).mean()
            loss = loss + self.reference_weight * parts["reference"]
        if self.perceptual is not None and self.perceptual_weight:
            parts["perceptual"] = self.perceptual(sr.flatten(0, 1), wanted.flatten(0, 1)).mean()
            loss = loss + self.perceptual_weight * parts["perceptual"]
        return {"loss": loss, **parts}

    def critic_losses(self, critic: nn.Module, step: int) -> Losses | None:
        return None

    def after_step(self, step: int) -> dict[str, Tensor]:
        return {}

    def validate(self, network: nn.Module, windows: Iterable[Batch]) -> tuple[dict[str, float], list[Tensor]]:
        images, scores, half = [], [], self.params.window // 2
        for lr, hr in windows:
            sr, real = network(lr, alone=self.alone), hr[:, half]
            enlarged = functional.interpolate(lr[:, half], scale_factor=self.params.scale, mode="bicubic").clamp(0, 1)
            scores.append(image_scores(sr, real, self.perceptual) | {"bicubic_psnr": psnr(enlarged, real)})
            images.append(torch.cat([enlarged, sr.clamp(0, 1), real], 3)[0])
        return mean_scores(scores), images


def _modules(*found: object) -> list[nn.Module]:
    return [module for module in found if isinstance(module, nn.Module)]


def psnr(image: Tensor, real: Tensor) -> float:
    """PSNR in dB of images in 0..1 after rounding to 256 grey values; at most 148 dB, for equal images."""
    error = (image.clamp(0, 1) * 255).round() - (real * 255).round()
    return float(20 * np.log10(255) - 10 * error.double().square().mean().clamp_min(1e-10).log10())


def image_scores(image: Tensor, real: Tensor, perceptual: Perceptual | None) -> dict[str, float]:
    """PSNR, and LPIPS where `perceptual` is given, of images (B, 1, H, W) in 0..1."""
    found = {"psnr": psnr(image, real)}
    return found if perceptual is None else found | {"lpips": float(perceptual(image.clamp(0, 1), real).mean())}


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every score over windows; empty where there are none."""
    return {name: float(np.mean([s[name] for s in scores])) for name in (scores[0] if scores else {})}
