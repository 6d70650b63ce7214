"""Modulated deformable 3x3 convolution (Zhu et al., 2019) in two ways: one for inference on a CPU, one for all else.

torchvision's operator is neither: before its change of 2026 (pytorch/vision issue 9513) it launched its kernels on the
default stream whatever the current one was, so that a CUDA graph did not contain them, and on a CPU it runs in one
thread.

Shapes: C channels in G groups that are moved alike; 9 taps. `head` (B, 27 G, H, W) is what the offset convolution
gives: per group and tap y and x of the offset in voxels (18 G channels), then per group and tap the logit of its weight
(9 G).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import by_hand, channels_last, conv3, in_type_of

TAPS = 9
POSITIONS = 768
"""Positions at which `gathered` samples at once."""


class DeformableConv(nn.Module):
    """A 3x3 convolution whose taps are moved and weighted; a plain 3x3 convolution computes the offsets and weights
    from another feature map. Before training all offsets are 0 and all weights 1/2.
    """

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(
            torch.empty(width, width, 3, 3).uniform_(-((TAPS * width) ** -0.5), (TAPS * width) ** -0.5)
        )
        self.bias = nn.Parameter(torch.zeros(width))
        self.offsets = conv3(width, 3 * TAPS * groups)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.offsets.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        """Features `x` and offset features `guide`, both (B, C, H, W) -> (B, C, H, W)."""
        head = self.offsets(guide)  # (B, 27 G, H, W)
        way = gathered if by_hand(x) else sampled
        return way(x, head, self.weight, self.bias, self.groups)


def sampled(x: Tensor, head: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """The convolution of `x` (B, C, H, W) on a GPU, and for training. -> (B, C, H, W) in the type of `weight`.

    Positions, and the maps that are sampled there, are float32. For training on a CPU the gradients of grid_sample cost
    a tenth of those of `gathered`.
    """
    b, channels, h, w = x.shape
    head = head.float()
    offset = head[:, : 2 * TAPS * groups].reshape(b * groups, TAPS, 2, h * w)
    mask = torch.sigmoid(head[:, 2 * TAPS * groups :]).reshape(b * groups, 1, TAPS, h * w)
    # positions (B G, 9, y and x, H W) in voxels, then in -1 .. 1
    at, size = _taps(h, w, x.device)
    grid = (offset + at).mul_(2).div_(size).sub_(1).permute(0, 1, 3, 2)
    # y comes first in `grid` and x in grid_sample's, so the maps (B G, C/G, H, W) are turned
    maps = x.float().reshape(b * groups, channels // groups, h, w).transpose(2, 3)
    samples = functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True) * mask
    columns = in_type_of(weight, samples.view(b, channels * TAPS, h * w).transpose(1, 2))  # (B, H W, 9 C)
    out = columns @ weight.flatten(1).T + bias  # (B, H W, C)
    return out.view(b, h, w, -1).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=64)
def _taps(h: int, w: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the nine taps of every voxel lie, y and x in voxels, (9, 2, H W), and by what they are divided, (2, 1).
    They are kept, since making them would make a GPU wait for the host.
    """
    with torch.inference_mode(False):
        tap = torch.arange(3, device=device, dtype=torch.float32) - 1
        y = tap.repeat_interleave(3).view(TAPS, 1, 1) + torch.arange(h, device=device).view(h, 1)
        x = tap.repeat(3).view(TAPS, 1, 1) + torch.arange(w, device=device)
        at = torch.stack([y.expand(TAPS, h, w), x.expand(TAPS, h, w)], 1).flatten(2)
        return at, torch.tensor([[max(h - 1, 1)], [max(w - 1, 1)]], device=device, dtype=torch.float32)


def gathered(x: Tensor, head: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """The same up to float32 rounding, for inference on a CPU. torchvision's CPU operator runs in one thread and reads
    channel by channel. Here each bilinear sample is a weighted sum of four rows of the channels-last map, where a row
    holds the channels of one group at one position; torch.nn.functional.embedding_bag computes such sums.

    A few rows of the map are computed at once, whose positions and weights stay in a core's own cache.
    """
    b, _, h, w = x.shape
    # a 1x1 convolution like layers.pointwise, for the rounding of a matrix product depends on the number of threads
    kernel = weight.view(len(weight), groups, -1, TAPS).transpose(2, 3).reshape(len(weight), -1, 1, 1)  # (C, 9 C, 1, 1)
    kernel = channels_last(kernel)
    out = weight.new_empty(b, h, w, len(weight)).permute(0, 3, 1, 2)  # (B, C, H, W), channels-last
    count = max(1, POSITIONS // w)
    for i, moved in enumerate(head.permute(0, 2, 3, 1)):
        padded = functional.pad(x[i].float(), (1, 2, 1, 2)).permute(1, 2, 0)
        rows = padded.reshape((h + 3) * (w + 3) * groups, -1)  # ((H + 3) (W + 3) G, C/G)
        for top in range(0, h, count):
            samples = _samples(rows, moved[top : top + count].float(), top, h, groups)  # (1, 9 C, n, W)
            product = functional.conv2d(in_type_of(weight, samples), kernel, bias, dilation=2)
            out[i : i + 1, :, top : top + count] = product
    return out


def _samples(rows: Tensor, head: Tensor, top: int, height: int, groups: int) -> Tensor:
    """The samples of n rows of a map, from row `top` of `height`: (1, 9 C, n, W).

    `head` is (n, W, 27 G). `rows` are those of the map with one voxel of zeros before it and two behind, so that a
    sample outside needs no weight of its own.
    """
    n, w = head.shape[:2]
    offset = head[..., : 2 * TAPS * groups].reshape(n, w, groups, TAPS, 2)
    mask = torch.sigmoid(head[..., 2 * TAPS * groups :]).view(n, w, groups, TAPS)
    tap = torch.arange(-1, 2)
    y = (offset[..., 0] + (torch.arange(top, top + n).view(n, 1, 1, 1) + tap.repeat_interleave(3))).clamp_(-1, height)
    x = (offset[..., 1] + (torch.arange(w).view(w, 1, 1) + tap.repeat(3))).clamp_(-1, w)
    low_y, low_x = y.floor(), x.floor()
    first = low_y.int().add_(1).mul_(w + 3).add_(low_x.int()).add_(1)
    first = first.mul_(groups).add_(torch.arange(groups, dtype=torch.int32).view(groups, 1))
    below = (w + 3) * groups
    first.clamp_(0, len(rows) - 1 - below - groups)  # what is no number has a row, too
    bags = torch.stack([first, first + groups, first + below, first + below + groups], -1)  # (n, W, G, 9, 4) rows
    y, x = y.sub_(low_y), x.sub_(low_x)
    before, after, left = mask * (1 - y), mask * y, 1 - x
    # PyTorch interleaves integers four times as fast as floats
    shares = torch.stack([s.view(torch.int32) for s in (before * left, before * x, after * left, after * x)], -1)
    samples = functional.embedding_bag(
        bags.view(-1, 4), rows, mode="sum", per_sample_weights=shares.view(torch.float32).view(-1, 4)
    )  # (n W G 9, C/G)
    return samples.view(1, n, w, -1).permute(0, 3, 1, 2)
