"""PSNR and SSIM of uint8 images: data range 255, no border cut off, SSIM with scikit-image's defaults (7 x 7 uniform window)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

Image = NDArray[np.uint8]


def psnr(image: Image, truth: Image) -> float:
    """dB; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - truth) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(image: Image, truth: Image) -> float:
    """Mean structural similarity (Wang et al., 2004)."""
    return float(structural_similarity(image, truth, data_range=255))
