"""Stage I: the VQGAN that learns what HR sections look like (paper, section 3.2)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import PriorParams
from models.layers import (
    Narrow,
    NormResidual,
    SelfAttention,
    Up,
    channels_last,
    conv3,
    in_bands,
    pointwise,
    weights_channels_last,
)


class Encoder(nn.Module):
    """(B, 1, H, W) HR section -> (B, d, H/p, W/p), Z_e of eq. 1."""

    def __init__(self, params: PriorParams) -> None:
        super().__init__()
        widths, groups = params.widths, params.norm_groups
        self.input = conv3(1, widths[0])
        body: list[nn.Module] = []
        for width, following in itertools.pairwise(widths):
            body += [NormResidual(width, width, groups), conv3(width, following, stride=2)]
        self.body = nn.Sequential(*body, SelfAttention(widths[-1], groups))
        self.head = nn.Sequential(*(NormResidual(widths[-1], widths[-1], groups) for _ in range(3)))
        self.project = pointwise(widths[-1], params.code_width)

    def forward(self, section: Tensor) -> Tensor:
        """HR section in 0..1, H and W multiples of p."""
        x = functional.relu_(self.input(channels_last(section)))
        return self.project(self.head(self.body(x)))  # type: ignore[no-any-return]


class Codebook(nn.Module):
    """The codebook C: v latent vectors of d numbers, the rows Z_q[j] of eq. 1. They start uniform in -1/v .. 1/v."""

    def __init__(self, params: PriorParams) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(params.codes, params.code_width).uniform_(-1 / params.codes, 1 / params.codes)
        )

    def nearest(self, latent: Tensor) -> Tensor:
        """(B, d, h, w) -> (B, h, w): the index of the row with the smallest squared Euclidean distance, eq. 1."""
        z = latent.permute(0, 2, 3, 1)
        return (self.weight.square().sum(1) - 2 * z @ self.weight.T).argmin(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) -> their rows (B, d, h, w), Z_d of eq. 1."""
        return functional.embedding(indices, self.weight).permute(0, 3, 1, 2)


class Decoded(NamedTuple):
    """What the decoder gives for an HR section of H x W: `image` is I_Ref (B, 1, H, W), and `features[l]` is F_Ref^l
    (B, C_l, H / 2^(l+1), W / 2^(l+1)), finest first.
    """

    image: Tensor
    features: list[Tensor]


class Decoder(nn.Module):
    """Quantised latents (B, d, H/p, W/p) -> the HR section and the features of every scale. There is no activation
    after the last convolution, and the image is not clamped.
    """

    def __init__(self, params: PriorParams) -> None:
        super().__init__()
        widths, groups = params.widths, params.norm_groups
        self.project = pointwise(params.code_width, widths[-1])
        self.head = nn.Sequential(*(NormResidual(widths[-1], widths[-1], groups) for _ in range(3)))
        self.attention = SelfAttention(widths[-1], groups)
        self.blocks = nn.ModuleList(NormResidual(width, width, groups) for width in widths[:0:-1])
        self.ups = nn.ModuleList(Up(width, wider) for width, wider in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.output = Narrow(widths[0], 1, 3)

    def forward(self, latent: Tensor) -> Decoded:
        x = self.attention(self.head(self.project(channels_last(latent))))
        features: list[Tensor] = []
        for block, up in zip(self.blocks, self.ups, strict=True):
            features.insert(0, block(x))
            if len(features) < len(self.ups):
                x = up(features[0])
        last = self.ups[-1]
        image = in_bands(lambda x: self.output(last(x)), features[0], halo=2, peak=4 * self.output.in_channels)
        return Decoded(image, features)


class VQGAN(nn.Module):
    """Encoder, codebook and decoder, as stage I trains them together."""

    def __init__(self, params: PriorParams) -> None:
        super().__init__()
        self.encoder = Encoder(params)
        self.codebook = Codebook(params)
        self.decoder = Decoder(params)
        weights_channels_last(self)

    def forward(self, section: Tensor, quantise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """HR section (B, 1, H, W) in 0..1 -> I_HRref (B, 1, H, W), Z_e and Z_d (both (B, d, H/p, W/p), eq. 1), for the
        loss of eqs. 5 and 6.

        The gradient of I_HRref at Z_d is passed on unchanged to Z_e (straight-through estimator). Where `quantise` (B,
        1, H/p, W/p) is false, the decoder is given Z_e in place of Z_d.
        """
        latent = self.encoder(section)
        quantised = self.codebook.lookup(self.codebook.nearest(latent))
        straight_through = latent + (quantised - latent).detach()
        image = self.decoder(
            straight_through if quantise is None else torch.where(quantise, straight_through, latent)
        ).image
        return image, latent, quantised
