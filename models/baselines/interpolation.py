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


BLOCK = 8
"""Input voxels along an axis whose outputs are one product."""
REACH = 2
"""So many voxels to either side of its own has an output a weight for."""
ONE_SUM = 192
"""Up to so many voxels along an axis BLAS adds the products of an output one after another. It puts longer sums
together from parts, which rounds otherwise.
"""


class Bicubic(nn.Module):
    """Cubic convolution (Keys, 1981, a = -0.75) with half-pixel centres and repeated edge voxels, as
    torch.nn.functional.interpolate(mode="bicubic", align_corners=False) and OpenCV's INTER_CUBIC compute it.

    The interpolation is linear and separable. It is computed as two products with a matrix that torch's own operator
    gives for the unit matrix: equal up to float32 rounding, and faster on a CPU. Of a row of the matrix five numbers
    are not zero at most, so that a CPU leaves out most of the others: the outputs of BLOCK voxels are made of these and
    of REACH voxels on either side. No bit changes where the sums are of one part.
    """

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self._matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._blocks_of: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def encode_section(self, section: Tensor) -> Tensor:
        """The state of a section is the section itself, (B, 1, H, W)."""
        return section

    def fuse_window(self, states: list[Tensor], cut: int = 0) -> Tensor:
        """One section (B, 1, H, W) in 0..1 -> (B, 1, r(H - 2 cut), r(W - 2 cut)). It is not clamped: cubic
        interpolation can overshoot.
        """
        x = states[0]
        height, width = x.shape[-2:]
        if x.is_cuda or max(height, width) > ONE_SUM:
            return within(self._matrix(height, x) @ x @ self._matrix(width, x).T, cut * self.scale)
        down, across = self._blocks(height, cut, x), self._blocks(width, cut, x).mT.contiguous()
        low, high = REACH - cut, (len(down) * BLOCK + cut - height + REACH, len(across) * BLOCK + cut - width + REACH)
        x = functional.pad(x[:, 0], (low, high[1], low, high[0]))
        rows, columns = (len(blocks) * BLOCK * self.scale for blocks in (down, across))
        out = x.new_empty(len(x), 1, rows, columns)
        for tile, sr in zip(x, out[:, 0], strict=True):
            enlarged = torch.bmm(down, _windows(tile).mT).flatten(0, 1)  # (rows, W + 2 REACH)
            torch.bmm(_windows(enlarged.T), across, out=sr.view(rows, len(across), -1).transpose(0, 1))
        return out[..., : (height - 2 * cut) * self.scale, : (width - 2 * cut) * self.scale]

    def _matrix(self, n: int, like: Tensor) -> Tensor:
        """The interpolation of n voxels along one axis, (r n, n), with the device and type of `like`."""
        key = (n, like.device, like.dtype)
        if key not in self._matrices:
            unit = torch.eye(n, dtype=torch.float32)[None, None]
            rows = functional.interpolate(unit, size=(n * self.scale, n), mode="bicubic", align_corners=False)[0, 0]
            self._matrices[key] = rows.to(like.device, like.dtype)
        return self._matrices[key]

    def _blocks(self, n: int, cut: int, like: Tensor) -> Tensor:
        """The parts of the matrix that are not all zeros, (blocks, r BLOCK, BLOCK + 2 REACH), for the outputs without
        those of `cut` voxels on each side. The last block is filled up with zeros.
        """
        key = (n, cut, like.dtype)
        if key not in self._blocks_of:
            blocks = -(-(n - 2 * cut) // BLOCK)
            beyond = blocks * BLOCK - (n - 2 * cut)
            rows = self._matrix(n, like)[cut * self.scale : (n - cut) * self.scale]
            padded = functional.pad(rows, (REACH - cut, REACH - cut + beyond, 0, beyond * self.scale))
            parts = padded.view(blocks, BLOCK * self.scale, -1)
            self._blocks_of[key] = torch.stack(
                [part[:, BLOCK * at : BLOCK * (at + 1) + 2 * REACH] for at, part in enumerate(parts)]
            )
        return self._blocks_of[key]


def _windows(x: Tensor) -> Tensor:
    """(N, M) -> (blocks, M, BLOCK + 2 REACH): what the rows of each block are made of, without a copy."""
    return x.unfold(0, BLOCK + 2 * REACH, BLOCK)
