"""Multi-scale prior fusion: LR features meet the reference's features, level by level (paper, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import Params
from models.layers import Residual, Up, bilinear, conv3, in_bands, lrelu, pointwise


class Fusion(nn.Module):
    """One level: R_F(<F_LR, F_Ref, F~>) * M."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = conv3(inputs, width)
        self.block = Residual(width)

    def forward(self, mask: Tensor, *features: Tensor) -> Tensor:
        return self.block(self.conv(torch.cat(features, 1))).mul_(mask)  # type: ignore[no-any-return]


class MPF(nn.Module):
    """Levels run from the finest (HR/2) to LR. `fuse` is R_F of eq. 4, `down` is R_D and `reduce` is R_O."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        width, levels = params.width, params.scale.bit_length() - 1
        reference = [*params.prior.widths[1:], *[0] * levels][:levels]  # a small patch's prior has no coarse features
        above = [level * width for level in range(levels)]
        self.up = nn.ModuleList(Up(width, width) for _ in range(levels - 1))
        self.fuse = nn.ModuleList(Fusion(width + r + a, width) for r, a in zip(reference, above, strict=True))
        self.down = nn.ModuleList(conv3(width + a, width + a, stride=2) for a in above[:-1])
        self.reduce = pointwise(width + above[-1] + width, width)

    def forward(self, features: Tensor, reference: list[Tensor], mask: Tensor) -> Tensor:
        """F_LR (B, C, H, W), F_Ref from the decoder, M (B, 1, rH/16, rW/16) -> F^Out (B, C, H, W)."""
        pyramid = [features]
        for up in self.up:
            pyramid.append(lrelu(up(pyramid[-1])))
        above: list[Tensor] = []  # F~^l, from the second level on
        for level, fuse in enumerate(self.fuse):
            maps = [pyramid.pop(), *reference[level : level + 1], *above]
            weight = bilinear(mask, 8 / 2**level)
            if level < len(self.down):
                above = [
                    in_bands(
                        Descent(fuse, self.down[level], len(above)), weight, *maps, reach=4, peak=features.shape[1]
                    )
                ]
        return self.reduce(torch.cat([fuse(weight, *maps), *above, features], 1))  # type: ignore[no-any-return]


class Descent:
    """The step from one level to the next coarser one, R_D(<R_F(...) * M, F~>), as a function of the maps of that level."""

    def __init__(self, fuse: nn.Module, down: nn.Module, above: int) -> None:
        self.fuse, self.down, self.above = fuse, down, above

    def __call__(self, mask: Tensor, *maps: Tensor) -> Tensor:
        fused = self.fuse(mask, *maps)
        return self.down(torch.cat([fused, *maps[-1:]], 1) if self.above else fused)  # type: ignore[no-any-return]
