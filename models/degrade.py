"""From HR to LR as the paper makes its pairs: antialiased bicubic, rounded to uint8."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

REACH = 4
"""LR voxels beyond a crop that its LR may depend on: the bicubic kernel, widened by the factor, reaches two."""


def degrade(section: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """(H, W) HR section, H and W multiples of `scale`, -> (H / scale, W / scale). Pillow's bicubic has the kernel of MATLAB's
    imresize, a = -1/2, widened by the factor.
    """
    h, w = section.shape
    return np.asarray(Image.fromarray(section).resize((w // scale, h // scale), Image.Resampling.BICUBIC))
