"""The blocks that several networks share (network.md, section 1), and how a chain of them is run in bands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

BAND_BYTES = 16 << 20
"""Working size of one band: what stays in a last-level cache, and below glibc's 32 MiB, where every buffer is mapped anew."""


def conv3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1)


def up2(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    """Transposed convolution to twice the size."""
    return nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1)


def lrelu(x: Tensor) -> Tensor:
    """Leaky ReLU with slope 0.1, in place: every caller hands over the fresh output of a convolution."""
    return functional.leaky_relu_(x, 0.1)


def channels_last(x: Tensor) -> Tensor:
    """`x` in channels-last layout, also where one channel leaves PyTorch no way to tell the layouts apart."""
    if x.shape[1] == 1:
        b, _, h, w = x.shape
        return x.reshape(b, h, w, 1).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def weights_channels_last(module: nn.Module) -> None:
    """Lay the kernels of all convolutions out channels-last; from then on every map has that layout."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = channels_last(parameter.data)


def bilinear(x: Tensor, factor: float) -> Tensor:
    """Half-pixel bilinear resizing (align_corners=False)."""
    return x if factor == 1 else functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


class Residual(nn.Module):
    """Residual block without norm (Stage III); starts near the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = conv3(width, width)
        self.conv2 = conv3(width, width)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight)
            conv.weight.data.mul_(0.1)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(functional.relu_(self.conv1(x))).add_(x)  # type: ignore[no-any-return]


class NormResidual(nn.Module):
    """Residual block with group norm (prior). The last ReLU is before the sum, nothing after it."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.conv1 = conv3(inputs, outputs)
        self.norm1 = group_norm(outputs, groups)
        self.conv2 = conv3(outputs, outputs)
        self.norm2 = group_norm(outputs, groups)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu_(self.norm1(self.conv1(x)))
        y = functional.relu_(self.norm2(self.conv2(y)))
        return y + self.skip(x)  # type: ignore[no-any-return]


def group_norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(groups, width), width, eps=1e-6)


class SelfAttention(nn.Module):
    """One head over all positions of a tile, added to the input; scores are never held whole."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (conv(y).permute(0, 2, 3, 1).reshape(b, 1, h * w, c) for conv in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v)
        return x + self.project(y.reshape(b, h, w, c).permute(0, 3, 1, 2))  # type: ignore[no-any-return]


def in_bands(chain: Callable[..., Tensor], *maps: Tensor, reach: int, peak: int) -> Tensor:
    """chain(*maps), computed band of rows by band of rows where the whole would not fit BAND_BYTES.

    `maps` are (B, *, H, W) of one size. Each row of the result depends on rows at most `reach` away (a multiple of the
    chain's stride), so what a band's edge spoils is cut off. `peak` is the largest intermediate map's size, channels
    times the square of its enlargement, per input position.

        |...reach|----------band----------|reach...|
    """
    b, _, height, width = maps[0].shape
    rows = max(16, BAND_BYTES // (4 * b * peak * width) // 16 * 16)
    if rows >= height:
        return chain(*maps)
    parts = []
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        low, high = max(0, start - reach), min(height, stop + reach)
        part = chain(*(m[:, :, low:high] for m in maps))
        scale = part.shape[2] / (high - low)
        parts.append(part[:, :, int((start - low) * scale) : int((stop - low) * scale)])
    return torch.cat(parts, 2)
