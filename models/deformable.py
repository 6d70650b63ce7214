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

from models.layers import by_hand, conv3, in_type_of

TAPS = 9


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
    """
    return torch.cat([_gathered_one(x[i : i + 1], head[i : i + 1], weight, bias, groups) for i in range(len(x))])


def _gathered_one(x: Tensor, head: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    _, channels, h, w = x.shape
    x, head = x.float(), head.float()
    rows = x.permute(0, 2, 3, 1).reshape(h * w * groups, channels // groups)  # (H W G, C/G)
    head = head[0].permute(1, 2, 0)  # (H, W, 27 G)
    offset = head[..., : 2 * TAPS * groups].reshape(h, w, groups, TAPS, 2)
    mask = torch.sigmoid(head[..., 2 * TAPS * groups :]).view(h, w, groups, TAPS)
    # per axis, index and weight of the two voxels on either side of a sampling position: two (H, W, G, 9) each
    tap = torch.arange(3, device=x.device) - 1
    y_index, y_weight = _corners(
        offset[..., 0], torch.arange(h, device=x.device).view(h, 1, 1, 1) + tap.repeat_interleave(3), h
    )
    x_index, x_weight = _corners(offset[..., 1], torch.arange(w, device=x.device).view(w, 1, 1) + tap.repeat(3), w)
    group = torch.arange(groups, device=x.device, dtype=torch.int32).view(groups, 1)
    y_weight = [weight * mask for weight in y_weight]
    bags = torch.stack([(y * w + x) * groups + group for y in y_index for x in x_index], -1)  # (H, W, G, 9, 4) rows
    shares = torch.stack([y * x for y in y_weight for x in x_weight], -1)  # (H, W, G, 9, 4) weights of these
    samples = functional.embedding_bag(bags.view(-1, 4), rows, mode="sum", per_sample_weights=shares.view(-1, 4))
    # samples (H W G 9, C/G), kernel (9 C, C), out (H W, C)
    kernel = weight.view(len(weight), groups, channels // groups, TAPS).permute(1, 3, 2, 0).reshape(-1, len(weight))
    out = torch.addmm(bias, in_type_of(weight, samples.view(h * w, -1)), kernel)
    return out.view(1, h, w, -1).permute(0, 3, 1, 2)


def _corners(offset: Tensor, base: Tensor, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Along one axis, index and weight of the voxels before and after each position base + offset; a voxel outside
    0 .. size - 1 has the weight 0.
    """
    at = base + offset
    low = at.floor()
    share = at - low
    indices, weights = [], []
    for corner, weight in ((low, 1 - share), (low + 1, share)):
        indices.append(corner.int().clamp_(0, size - 1))
        weights.append(weight * ((corner >= 0) & (corner < size)))
    return indices, weights
