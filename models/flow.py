"""SPyNet: coarse-to-fine optical flow between two sections (Ranjan and Black, 2017; network.md, section 3, step 7)."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import Conv2d, Narrow, channels_last

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class SPyNet(nn.Module):
    """Optical flow from `first` to `second`. Normalising a grey image with ImageNet's means and standard deviations of
    three channels makes it the three-channel image that the network takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, widths: tuple[int, int, int, int], levels: int) -> None:
        super().__init__()
        channels = (8, *widths, 2)
        self.levels = nn.ModuleList()
        for _ in range(levels):
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise(channels[:-1]):
                conv = Conv2d(inputs, outputs, 7, 1, 3) if outputs >= 16 else Narrow(inputs, outputs, 7)
                layers += [conv, nn.ReLU(inplace=True)]
            self.levels.append(nn.Sequential(*layers, Narrow(channels[-2], channels[-1], 7)))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, 1, H, W) in 0..1 -> the flow (B, 2, H, W), x then y, in voxels: first(x) = second(x + flow(x)).

        Images whose sides are no multiples of 32 are resized to the next ones, and the flow back.
        """
        height, width = first.shape[-2:]
        padded = (-(-height // 32) * 32, -(-width // 32) * 32)
        flow = resize(
            self._flow(self._pyramid(resize(first, padded)), self._pyramid(resize(second, padded))), (height, width)
        )
        if padded == (height, width):
            return flow  # every tile of the pipeline
        return torch.cat([flow[:, :1] * (width / padded[1]), flow[:, 1:] * (height / padded[0])], 1)

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        """(B, 1, H, W) -> the image at every level's size, coarsest first, each side half that of the next."""
        pyramid = [image]
        for _ in self.levels[1:]:
            pyramid.insert(0, functional.avg_pool2d(pyramid[0], 2))
        return pyramid

    def _flow(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        b, _, h, w = first[0].shape
        flow = first[0].new_zeros(b, 2, h, w)
        for level, one, other in zip(self.levels, first, second, strict=True):
            if flow.shape[-2:] != one.shape[-2:]:
                flow = 2 * functional.interpolate(flow, size=one.shape[-2:], mode="bilinear", align_corners=True)
            images = [(image - self.mean) / self.std for image in (one, warp(other, flow))]  # two (B, 3, h, w)
            flow = flow + level(channels_last(torch.cat([*images, flow], 1)))  # (B, 8, h, w) -> (B, 2, h, w)
        return flow


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` (B, C, H, W) sampled bilinearly at (x + flow_x, y + flow_y) of `flow` (B, 2, H, W); positions outside
    take the nearest border voxel.
    """
    at, size = _positions(image.shape[-2], image.shape[-1], image.device, flow.dtype)
    grid = (at + flow).mul_(2).div_(size).sub_(1).permute(0, 2, 3, 1)  # (B, H, W, x and y)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


@functools.lru_cache(maxsize=64)
def _positions(h: int, w: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The x and y of every voxel, (2, H, W), and by what they are divided, (2, 1, 1). They are kept, since making them
    would make a GPU wait for the host.
    """
    with torch.inference_mode(False):
        y, x = torch.meshgrid(*(torch.arange(n, device=device, dtype=dtype) for n in (h, w)), indexing="ij")
        return torch.stack([x, y]), torch.tensor([[[max(w - 1, 1)]], [[max(h - 1, 1)]]], device=device, dtype=dtype)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of (B, C, H, W) to `size`, with half-pixel centres."""
    return (
        image
        if tuple(image.shape[-2:]) == size
        else functional.interpolate(image, size=size, mode="bilinear", align_corners=False)
    )
