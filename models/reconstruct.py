"""Rec: computes from the fused LR features what is added to the enlarged LR section (network.md, section 3, step
14).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models.config import Params
from models.layers import Narrow, Residual, conv3, in_bands, lrelu, within

REACH = 2
"""LR voxels beyond a voxel's own that its SR voxels depend on after the trunk: one for the first doubling's convolution
and together less than one for those that follow.
"""


class Reconstruction(nn.Module):
    """Residual blocks at LR size, log2(r) times a sub-pixel convolution to twice the size, two convolutions at HR
    size.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        width = params.width
        self.trunk = nn.Sequential(*(Residual(width) for _ in range(params.trunk_blocks)))
        self.up = nn.ModuleList(conv3(width, 4 * width) for _ in range(params.scale.bit_length() - 1))
        self.hr = conv3(width, width)
        self.last = Narrow(width, 1, 3)

    def forward(self, features: Tensor, cut: int = 0) -> Tensor:
        """(B, C, H, W) -> (B, 1, r(H - 2 cut), r(W - 2 cut)): without what `cut` LR voxels on each side become.

        From the doublings on, a voxel depends on what lies within REACH of it, so the rest is cut off before them.
        """
        x = within(self.trunk(features.float()), max(0, cut - REACH))
        scale = 1 << len(self.up)
        for up in self.up[:-1]:
            x = _double(up, x)  # (B, C, 2^i H, 2^i W)
        image = in_bands(self._to_image, x, halo=3, peak=4 * self.hr.in_channels)
        return within(image, min(cut, REACH) * scale)

    def _to_image(self, x: Tensor) -> Tensor:
        """(B, C, rH/2, rW/2) -> (B, 1, rH, rW)."""
        return self.last(lrelu(self.hr(_double(self.up[-1], x))))  # type: ignore[no-any-return]


def _double(up: nn.Module, x: Tensor) -> Tensor:
    """Sub-pixel convolution: (B, C, h, w) -> (B, 4C, h, w) -> (B, C, 2h, 2w)."""
    return lrelu(shuffled(up(x)))


def shuffled(x: Tensor) -> Tensor:
    """torch.nn.functional.pixel_shuffle by 2, (B, 4C, h, w) -> (B, C, 2h, 2w). A GPU keeps channels-last maps so in one
    copy; PyTorch's operator would turn them over there.
    """
    if x.device.type == "cpu":
        return functional.pixel_shuffle(x, 2)
    b, c, h, w = x.shape
    parts = x.permute(0, 2, 3, 1).reshape(b, h, w, c // 4, 2, 2)  # the last two are row and column
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(b, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)
