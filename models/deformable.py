"""Modulated deformable 3x3 convolution (Zhu et al., 2019): torchvision's operator on a GPU, and on a CPU two ways of
our own, one for inference and one for training.

Shapes: C channels in G groups that are moved alike; 9 taps. `head` (B, 27 G, H, W) is what the offset convolution
gives: per group and tap y and x of the offset in voxels (18 G channels), then per group and tap the logit of its weight
(9 G).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import conv3

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
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return sampled(x, head, self.weight, self.bias, self.groups)
        if x.device.type == "cpu":
            return gathered(x, head, self.weight, self.bias, self.groups)
        return by_torchvision(x, head, self.weight, self.bias, self.groups)


def by_torchvision(x: Tensor, head: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """The convolution of `x` (B, C, H, W) by torchvision's operator. -> (B, C, H, W)."""
    from torchvision.ops import deform_conv2d

    offset, mask = head[:, : 2 * TAPS * groups], head[:, 2 * TAPS * groups :]
    out: Tensor = deform_conv2d(
        x.contiguous(), offset.contiguous(), weight, bias, padding=1, mask=torch.sigmoid(mask).contiguous()
    )
    return out


def sampled(x: Tensor, head: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """The same up to the rounding of coordinates, for training on a CPU: the gradients of grid_sample cost a tenth of
    those of `gathered`.
    """
    b, channels, h, w = x.shape
    offset = head[:, : 2 * TAPS * groups].reshape(b * groups, TAPS, 2, h, w)
    mask = torch.sigmoid(head[:, 2 * TAPS * groups :]).reshape(b * groups, 1, TAPS * h, w)
    # sampling positions in voxels, (B G, 9, H, W) each
    tap = torch.arange(3, device=x.device, dtype=x.dtype) - 1
    y = (
        offset[:, :, 0]
        + tap.repeat_interleave(3).view(TAPS, 1, 1)
        + torch.arange(h, device=x.device, dtype=x.dtype).view(h, 1)
    )
    x_ = offset[:, :, 1] + tap.repeat(3).view(TAPS, 1, 1) + torch.arange(w, device=x.device, dtype=x.dtype)
    grid = torch.stack([2 * x_ / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1], -1).reshape(b * groups, TAPS * h, w, 2)
    maps = x.reshape(b * groups, channels // groups, h, w)  # (B G, C/G, H, W)
    samples = functional.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=True) * mask
    columns = samples.view(b, channels, TAPS, h * w).flatten(1, 2)  # (B, 9 C, H W)
    return (weight.flatten(1) @ columns + bias.view(-1, 1)).view(b, -1, h, w)


def gathered(x: Tensor, head: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """The same up to float32 rounding, for inference on a CPU. torchvision's CPU operator runs in one thread and reads
    channel by channel. Here each bilinear sample is a weighted sum of four rows of the channels-last map, where a row
    holds the channels of one group at one position; torch.nn.functional.embedding_bag computes such sums.
    """
    return torch.cat([_gathered_one(x[i : i + 1], head[i : i + 1], weight, bias, groups) for i in range(len(x))])


def _gathered_one(x: Tensor, head: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    _, channels, h, w = x.shape
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
    out = torch.addmm(bias, samples.view(h * w, -1), kernel)
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
