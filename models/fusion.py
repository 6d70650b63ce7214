"""3DA: attention over a window's aligned sections and over positions (network.md, section 3, step 13).

Shapes: B windows of N sections, C = `width` channels, LR size H x W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import Params
from models.layers import bilinear, channels_last, conv3, lrelu, pointwise, side_by_side


class SectionMix(nn.Module):
    """A 1x1x1 convolution that mixes the N sections of a window, then a 1x1 convolution to one section's channels."""

    def __init__(self, sections: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(sections, sections, 1)
        self.reduce = pointwise(sections * width, width)

    def forward(self, window: Tensor) -> Tensor:
        """(B, N, C, H, W) -> (B, C, H, W).

        The sections are added one after the other: the rounding of a matrix product depends on the number of threads.
        """
        mix = self.mix.weight.view(*self.mix.weight.shape[:2], 1, 1, 1)  # (N out, N in, 1, 1, 1)
        bias = self.mix.bias.view(-1, 1, 1, 1)  # type: ignore[union-attr]
        mixed: Tensor = bias + mix[:, 0] * window[:, :1]  # (B, N, C, H, W)
        for n in range(1, window.shape[1]):
            mixed = mixed + mix[:, n] * window[:, n : n + 1]
        return lrelu(self.reduce(side_by_side(lrelu(mixed))))  # N * C -> C channels


class SpatialAttention(nn.Module):
    """Attention over positions: two downsamplings by 2 and back up. It gives the attention map before its sigmoid, and
    a map that is added to the attended features.
    """

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
        a = lrelu(self.conv1(window))  # (B, C, H, W)
        a = lrelu(self.conv2(_pooled(a)))  # (B, C, H/2, W/2)
        low = lrelu(self.low2(_pooled(lrelu(self.low1(a)))))  # (B, C, H/4, W/4)
        a = lrelu(self.conv3(a)) + bilinear(lrelu(self.low3(low)), 2)  # (B, C, H/2, W/2)
        attention = self.conv5(bilinear(lrelu(self.conv4(a)), 2))  # (B, C, H, W)
        return attention, self.add2(lrelu(self.add1(attention)))  # two (B, C, H, W)


class ThreeDA(nn.Module):
    """The aligned features of a window are fused to the features of its centre section."""

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
        query = self.query(aligned[:, n // 2])  # (B, C, H, W), of the centre
        keys = self.key(aligned.flatten(0, 1)).unflatten(0, (b, n))  # (B, N, C, H, W)
        weights = torch.sigmoid((query[:, None] * keys).sum(2, keepdim=True))  # (B, N, 1, H, W)
        window = aligned * weights  # (B, N, C, H, W)
        flat = channels_last(side_by_side(window))  # (B, N * C, H, W)
        fused = lrelu(self.fuse(flat)) + self.mix1(window)  # (B, C, H, W), as all that follows
        attention, added = self.spatial(flat)
        attended = 2 * fused * torch.sigmoid(attention)
        return attended + added + self.mix2(window) + self.refine(fused)  # type: ignore[no-any-return]


def _pooled(x: Tensor) -> Tensor:
    """Max pooling and average pooling, 3x3 with stride 2, concatenated: (B, C, H, W) -> (B, 2C, H/2, W/2)."""
    return torch.cat([functional.max_pool2d(x, 3, 2, 1), functional.avg_pool2d(x, 3, 2, 1)], 1)
