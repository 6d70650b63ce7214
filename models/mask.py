"""The mask M: how far the reference may be trusted, by comparing it with the enlarged section (paper, figure 1 d)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import VGG19, Params, PriorParams
from models.layers import NormResidual, bilinear, channels_last, conv3, in_bands, lrelu

PATCH = 16
EPSILON = 1e-12


class VGGFeatures(nn.Module):
    """VGG19 to relu1_2 of a grey image shown as three equal channels: the first convolution is run once, with summed weights."""

    width = 64
    local = True

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3(3, self.width)
        self.conv2 = conv3(self.width, self.width)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) in 0..1 -> (B, 64, H, W)."""
        weight = channels_last(self.conv1.weight.sum(1, keepdim=True))
        x = functional.relu_(functional.conv2d(channels_last(image), weight, self.conv1.bias, padding=1))
        return functional.relu_(self.conv2(x))


class EncoderFeatures(nn.Module):
    """The layers of our own VQGAN encoder at HR size."""

    local = False  # group norm looks at the whole image

    def __init__(self, params: PriorParams) -> None:
        super().__init__()
        self.width = params.widths[0]
        self.input = conv3(1, self.width)
        self.block = NormResidual(self.width, self.width, params.norm_groups)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) in 0..1 -> (B, C, H, W)."""
        return self.block(functional.relu_(self.input(channels_last(image))))  # type: ignore[no-any-return]


class Mask(nn.Module):
    """Cosine similarity of reference and enlarged section in 16 x 16 patches of features, refined to M."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.scale = params.scale
        self.features = VGGFeatures() if params.mask == VGG19 else EncoderFeatures(params.prior)
        self.refine = nn.Sequential(conv3(1, params.width), conv3(params.width, params.width), conv3(params.width, 1))

    def forward(self, section: Tensor, reference: Tensor) -> Tensor:
        """Section (B, 1, H, W) and I_Ref (B, 1, rH, rW) -> M (B, 1, rH/16, rW/16) in 0..1."""
        x = self.cosine(section, reference)
        for conv in self.refine:
            x = lrelu(conv(channels_last(x)))
        return torch.sigmoid(x)

    def cosine(self, section: Tensor, reference: Tensor) -> Tensor:
        """CS of the paper, (B, 1, rH/16, rW/16).

        A patch's dot product and norms are sums over its positions: no patch is laid out as a vector of 16,384 numbers.
        """
        images = (bilinear(section, self.scale), reference)
        products = (
            in_bands(self._products, *images, reach=2, peak=self.features.width)
            if self.features.local
            else self._products(*images)
        )
        dot, a, b = functional.avg_pool2d(products, PATCH).mul(PATCH * PATCH).chunk(3, 1)
        return dot / (a.sqrt().clamp_min(EPSILON) * b.sqrt().clamp_min(EPSILON))

    def _products(self, image: Tensor, reference: Tensor) -> Tensor:
        """(B, 3, rH, rW): per position the sums over channels of a * b, a * a and b * b."""
        a, b = self.features(image), self.features(reference)
        return torch.stack([(a * b).sum(1), a.square_().sum(1), b.square_().sum(1)], 1)
