"""Replacements of modules that are switched off: residual blocks with about as many parameters (paper, table 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import Params
from models.fusion import ThreeDA
from models.layers import Residual, pointwise
from models.mask import Mask
from models.mpf import MPF
from models.pod import POD


def count(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def blocks(width: int, parameters: int) -> nn.Sequential:
    """As many residual blocks of `width` channels as have about `parameters` parameters together."""
    with torch.device("meta"):
        one = count(Residual(width))
    return nn.Sequential(*(Residual(width) for _ in range(round(parameters / one))))


class WithoutMPF(nn.Module):
    """In place of MPF, mask and prior: residual blocks on the LR features of one section."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        with torch.device("meta"):
            size = count(MPF(params)) + count(Mask(params).refine)
        self.blocks = blocks(params.width, size)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.blocks(features)  # type: ignore[no-any-return]


class WithoutPOD(nn.Module):
    """In place of POD: residual blocks on the features of each section. Nothing is aligned."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        with torch.device("meta"):
            pod = POD(params)
            size = count(pod) - count(pod.flow)
        self.blocks = blocks(params.width, size)

    def pyramid(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> one map of the same shape."""
        return (self.blocks(features),)

    def forward(self, sections: Tensor, pyramids: list[tuple[Tensor, ...]]) -> Tensor:
        """LR sections, which are not used, and N pyramids of one (B, C, H, W) each -> (B, N, C, H, W)."""
        return torch.stack([level for (level,) in pyramids], 1)


class WithoutThreeDA(nn.Module):
    """In place of 3DA: a 1x1 convolution over the concatenated sections, then residual blocks."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.reduce = pointwise(params.window * params.width, params.width)
        with torch.device("meta"):
            size = count(ThreeDA(params)) - count(pointwise(params.window * params.width, params.width))
        self.blocks = blocks(params.width, size)

    def forward(self, aligned: Tensor) -> Tensor:
        """(B, N, C, H, W) -> (B, C, H, W)."""
        return self.blocks(self.reduce(aligned.flatten(1, 2).contiguous(memory_format=torch.channels_last)))  # type: ignore[no-any-return]
