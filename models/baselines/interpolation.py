"""Nearest and bicubic upsampling: networks without weights, whose window is one section."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import within


class Nearest(nn.Module):
    """Repeats every LR voxel r x r times."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def encode_section(self, section: Tensor) -> Tensor:
        """The state of a section is the section itself, (B, 1, H, W)."""
        return section

    def fuse_window(self, states: list[Tensor], cut: int = 0) -> Tensor:
        """One section (B, 1, H, W) in 0..1 -> (B, 1, r(H - 2 cut), r(W - 2 cut))."""
        return within(states[0], cut).repeat_interleave(self.scale, -2).repeat_interleave(self.scale, -1)


class Bicubic(nn.Module):
    """Cubic convolution (Keys, 1981, a = -0.75) with half-pixel centres and repeated edge voxels, as
    torch.nn.functional.interpolate(mode="bicubic", align_corners=False) and OpenCV's INTER_CUBIC compute it.

    The interpolation is linear and separable. It is computed as two products with a matrix that torch's own operator
    gives for the unit matrix: equal up to float32 rounding, and three times faster on a CPU.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self._matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def encode_section(self, section: Tensor) -> Tensor:
        """The state of a section is the section itself, (B, 1, H, W)."""
        return section

    def fuse_window(self, states: list[Tensor], cut: int = 0) -> Tensor:
        """One section (B, 1, H, W) in 0..1 -> (B, 1, r(H - 2 cut), r(W - 2 cut)). It is not clamped: cubic
        interpolation can overshoot.
        """
        x = states[0]
        return within(self._matrix(x.shape[-2], x) @ x @ self._matrix(x.shape[-1], x).T, cut * self.scale)

    def _matrix(self, n: int, like: Tensor) -> Tensor:
        """The interpolation of n voxels along one axis, (r n, n), with the device and type of `like`."""
        key = (n, like.device, like.dtype)
        if key not in self._matrices:
            unit = torch.eye(n, dtype=torch.float32)[None, None]
            rows = functional.interpolate(unit, size=(n * self.scale, n), mode="bicubic", align_corners=False)[0, 0]
            self._matrices[key] = rows.to(like.device, like.dtype)
        return self._matrices[key]
