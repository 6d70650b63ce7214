"""Reduces HR sections to LR as the paper makes its pairs: antialiased bicubic, rounded to uint8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HALO = 4
"""LR voxels to be read around a crop, so that its LR is that of the whole section. The bicubic kernel is 2 LR voxels
wide on either side."""


def degrade(section: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """HR section (H, W), H and W multiples of `scale`, -> LR section (H / scale, W / scale).

    Pillow's bicubic has the kernel of MATLAB's imresize (Keys, 1981, a = -1/2), widened by the scale.
    """
    h, w = section.shape
    return np.asarray(Image.fromarray(section).resize((w // scale, h // scale), Image.Resampling.BICUBIC))
