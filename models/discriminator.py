"""Stage I: the PatchGAN discriminator D of eq. 5 (Isola et al., 2017)."""

from __future__ import annotations

from torch import Tensor, nn


class Discriminator(nn.Module):
    """HR section (B, 1, H, W) -> one score per overlapping patch: 512 x 512 voxels give (B, 1, 56, 56). No convolution
    pads its input. `width` is the number of channels after the first one.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 4, 2), nn.LeakyReLU(0.2, inplace=True)]
        for inputs, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers += [
                nn.Conv2d(inputs, 2 * inputs, 4, stride, bias=False),
                nn.InstanceNorm2d(2 * inputs),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.model = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1))

    def forward(self, section: Tensor) -> Tensor:
        return self.model(section)  # type: ignore[no-any-return]
