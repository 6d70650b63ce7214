"""Multi-scale prior fusion (MPF): the LR features and the reference's features are fused level by level (paper, eq. 4).

Shapes: B sections, C = `width` channels, LR size H x W, scale r, L = log2(r) levels. Level l has the size
rH / 2^(l+1) x rW / 2^(l+1), written h_l x w_l below; level 0 is the finest and level L - 1 has LR size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import Params
from models.layers import Residual, Up, bilinear, conv3, in_bands, lrelu, pointwise


class Fusion(nn.Module):
    """The fusion convolution of one level, masked: R_F(<F_LR, F_Ref, F~>) * M of eq. 4."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = conv3(inputs, width)
        self.block = Residual(width)

    def forward(self, mask: Tensor, *features: Tensor) -> Tensor:
        """M (B, 1, h_l, w_l) and feature maps (B, *, h_l, w_l), which are concatenated in their order ->
        (B, C, h_l, w_l).
        """
        return self.block(self.conv(torch.cat(features, 1))).mul_(mask)  # type: ignore[no-any-return]


class MPF(nn.Module):
    """All levels, from the finest to LR size. `fuse` is R_F of eq. 4, `down` is R_D and `reduce` is R_O."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        width, levels = params.width, params.scale.bit_length() - 1
        reference = [*params.prior.widths[1:], *[0] * levels][:levels]  # a small patch's prior has no coarse features
        previous = [level * width for level in range(levels)]  # channels of F~^l
        self.up = nn.ModuleList(Up(width, width) for _ in range(levels - 1))
        self.fuse = nn.ModuleList(Fusion(width + r + p, width) for r, p in zip(reference, previous, strict=True))
        self.down = nn.ModuleList(conv3(width + p, width + p, stride=2) for p in previous[:-1])
        self.reduce = pointwise(width + previous[-1] + width, width)

    def forward(self, features: Tensor, reference: list[Tensor], mask: Tensor) -> Tensor:
        """F_LR (B, C, H, W), F_Ref^l (B, C_l, h_l, w_l) from the decoder and M (B, 1, rH/16, rW/16) ->
        F^Out (B, C, H, W).
        """
        pyramid = [features]  # F_LR at LR size, then at 2, 4, ... times that: (B, C, 2^i H, 2^i W)
        for up in self.up:
            pyramid.append(lrelu(up(pyramid[-1])))
        previous: list[Tensor] = []  # F~^l (B, l * C, h_l, w_l), from level 1 on
        for level, fuse in enumerate(self.fuse):
            maps = [pyramid.pop(), *reference[level : level + 1], *previous]  # C + C_l + l * C channels at h_l x w_l
            weight = bilinear(mask, 8 / 2**level)  # M (B, 1, h_l, w_l)
            if level < len(self.down):
                step = FuseAndDownsample(fuse, self.down[level], len(previous))
                previous = [in_bands(step, weight, *maps, halo=4, peak=features.shape[1])]
        fused = fuse(weight, *maps)  # F^ (B, C, H, W) of the last level
        return self.reduce(torch.cat([fused, *previous, features], 1))  # type: ignore[no-any-return]


class FuseAndDownsample:
    """R_D(<R_F(...) * M, F~^l>) of level l, which is F~^(l+1), as a function of that level's maps."""

    def __init__(self, fuse: nn.Module, down: nn.Module, previous: int) -> None:
        self.fuse, self.down, self.previous = fuse, down, previous

    def __call__(self, mask: Tensor, *maps: Tensor) -> Tensor:
        """M (B, 1, h_l, w_l), F_LR, F_Ref and F~^l (B, *, h_l, w_l) -> F~^(l+1) (B, (l + 1) * C, h_l / 2, w_l / 2)."""
        fused = self.fuse(mask, *maps)  # (B, C, h_l, w_l)
        return self.down(torch.cat([fused, *maps[-1:]], 1) if self.previous else fused)  # type: ignore[no-any-return]
