"""Training pairs for optical flow: a section, and the same section shifted and smoothly warped by a known flow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.flow import warp
from models.layers import bilinear

ENLARGED = 4
"""POD computes the flow between LR sections enlarged four times (network.md, section 3, step 7)."""


def warped_pair(
    lr: Tensor, hr: Tensor, rng: np.random.Generator, shift: float, bend: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A training pair from two neighbouring sections, LR (B, 2, 1, h, w) and HR (B, 2, 1, H, W) in 0..1.

    Returns first and second image, LR sections enlarged four times, (B, 1, 4h, 4w), and the flow (B, 2, 4h, 4w) between
    them, x then y, in their voxels: first(x) = second(x + flow(x)). In HR voxels, `shift` is the largest shift of the
    whole section along an axis and `bend` the standard deviation of the smooth field. The first image is blended with
    the neighbouring section, and has noise and another contrast, as real neighbours differ too.
    """
    b, _, _, height, width = hr.shape
    scale = height // lr.shape[3]
    coarse = rng.normal(0, bend, (b, 2, 4, 4)) + rng.uniform(-shift, shift, (b, 2, 1, 1))
    field = functional.interpolate(
        torch.from_numpy(coarse).float(), size=(height, width), mode="bicubic", align_corners=True
    )
    moved = warp(hr[:, 0], field)
    other = torch.from_numpy(rng.uniform(0, 0.5, (b, 1, 1, 1))).float()
    first = (1 - other) * moved + other * hr[:, 1]
    first = functional.interpolate(
        first, size=(height // scale, width // scale), mode="bicubic", antialias=True, align_corners=False
    )
    gain, noise = rng.uniform(0.85, 1.15, (b, 1, 1, 1)), rng.normal(0, 0.02, tuple(first.shape))
    first = ((first - 0.5) * torch.from_numpy(gain).float() + 0.5 + torch.from_numpy(noise).float()).clamp(0, 1)
    flow = bilinear(field, ENLARGED / scale) * (ENLARGED / scale)
    return bilinear(first, ENLARGED), bilinear(lr[:, 0], ENLARGED), flow


def endpoint_error(found: Tensor, flow: Tensor) -> Tensor:
    """The endpoint error of a flow (B, 2, 4h, 4w): the mean length of its difference from the true one, in voxels."""
    return (found - flow).square().sum(1).add(1e-8).sqrt().mean()
