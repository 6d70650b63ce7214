"""3DA: attention over a window's aligned sections and over positions (network.md, section 3, step 13)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import Params
from models.layers import bilinear, conv3, lrelu, pointwise


class SectionMix(nn.Module):
    """N x N mix of the sections (a 1x1x1 convolution over z), then 1x1 to one section's width."""

    def __init__(self, sections: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(sections, sections, 1)
        self.reduce = pointwise(sections * width, width)

    def forward(self, window: Tensor) -> Tensor:
        """(B, N, C, H, W) -> (B, C, H, W). Section by section: a matrix product would round by the number of threads."""
        mix = self.mix.weight.view(*self.mix.weight.shape[:2], 1, 1, 1)
        mixed: Tensor = self.mix.bias.view(-1, 1, 1, 1) + mix[:, 0] * window[:, :1]  # type: ignore[union-attr]
        for n in range(1, window.shape[1]):
            mixed = mixed + mix[:, n] * window[:, n : n + 1]
        return lrelu(self.reduce(lrelu(mixed).flatten(1, 2)))


class SpatialAttention(nn.Module):
    """Two halvings and back; gives the gate (before its sigmoid) and what is added beside it."""

    def __init__(self, sections: int, width: int) -> None:
        super().__init__()
        self.conv1 = pointwise(sections * width, width)
        self.conv2 = pointwise(2 * width, width)
        self.conv3 = conv3(width, width)
        self.conv4 = pointwise(width, width)
        self.conv5 = conv3(width, width)
        self.low1 = pointwise(width, width)
        self.low2 = conv3(2 * width, width)
        self.low3 = conv3(width, width)
        self.add1 = pointwise(width, width)
        self.add2 = pointwise(width, width)

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N * C, H, W) -> two (B, C, H, W)."""
        a = lrelu(self.conv2(_pooled(lrelu(self.conv1(window)))))
        low = lrelu(self.low2(_pooled(lrelu(self.low1(a)))))
        a = lrelu(self.conv3(a)) + bilinear(lrelu(self.low3(low)), 2)
        gate = self.conv5(bilinear(lrelu(self.conv4(a)), 2))
        return gate, self.add2(lrelu(self.add1(gate)))


class ThreeDA(nn.Module):
    """A window of aligned features becomes one section's features."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        width, sections = params.width, params.window
        self.query = conv3(width, width)
        self.key = conv3(width, width)
        self.fuse = pointwise(sections * width, width)
        self.mix1 = SectionMix(sections, width)
        self.mix2 = SectionMix(sections, width)
        self.refine = pointwise(width, width)
        self.spatial = SpatialAttention(sections, width)

    def forward(self, aligned: Tensor) -> Tensor:
        """(B, N, C, H, W) -> (B, C, H, W)."""
        b, n, _, _, _ = aligned.shape
        query = self.query(aligned[:, n // 2])
        keys = self.key(aligned.flatten(0, 1)).unflatten(0, (b, n))
        window = aligned * torch.sigmoid((query[:, None] * keys).sum(2, keepdim=True))
        flat = window.flatten(1, 2).contiguous(memory_format=torch.channels_last)
        fused = lrelu(self.fuse(flat)) + self.mix1(window)
        gate, added = self.spatial(flat)
        return 2 * fused * torch.sigmoid(gate) + added + self.mix2(window) + self.refine(fused)  # type: ignore[no-any-return]


def _pooled(x: Tensor) -> Tensor:
    """Max and mean of 3x3 at half the size: (B, C, H, W) -> (B, 2C, H/2, W/2)."""
    return torch.cat([functional.max_pool2d(x, 3, 2, 1), functional.avg_pool2d(x, 3, 2, 1)], 1)
