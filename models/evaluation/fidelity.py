"""PSNR and two kinds of SSIM of uint8 images. The data range is 255; no border is cut off before an image is scored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

Image = NDArray[np.uint8]


def psnr(image: Image, truth: Image) -> float:
    """Peak signal-to-noise ratio of two (H, W) images in dB; it is infinite for equal images."""
    error = np.mean((image.astype(np.float64) - truth) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(image: Image, truth: Image) -> float:
    """Mean structural similarity of two (H, W) images with scikit-image's defaults: a uniform 7 x 7 window and sample
    covariance. This is not the window of Wang et al. (2004); `ssim_gaussian` is.

    Raises ValueError where H or W is less than 7.
    """
    return float(structural_similarity(image, truth, data_range=255))


def ssim_gaussian(image: Image, truth: Image) -> float:
    """Mean structural similarity of two (H, W) images as Wang et al. (2004) define it: an 11 x 11 Gaussian window with
    a standard deviation of 1.5 voxels, K1 = 0.01, K2 = 0.03, and covariances divided by the sum of the window's
    weights. The mean is over the windows that lie wholly inside the image.

    Raises ValueError where H or W is less than 11.
    """
    return float(
        structural_similarity(
            image,
            truth,
            win_size=11,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
        )
    )
