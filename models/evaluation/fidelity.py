"""PSNR and two kinds of SSIM of uint8 images. The data range is 255; no border is cut off before an image is scored.

`valid` is True where voxels are scored (None: all are). Each is None where nothing is left to score.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

Image = NDArray[np.uint8]
Valid = NDArray[np.bool_]


def psnr(image: Image, truth: Image, valid: Valid | None = None) -> float | None:
    """Peak signal-to-noise ratio of two (H, W) images in dB; it is infinite for equal images."""
    squares = (image.astype(np.float64) - truth) ** 2
    if valid is not None and not valid.any():
        return None
    error = squares.mean() if valid is None else squares[valid].mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(image: Image, truth: Image, valid: Valid | None = None) -> float | None:
    """Mean structural similarity of two (H, W) images with scikit-image's defaults: a uniform 7 x 7 window and sample
    covariance. This is not the window of Wang et al. (2004); `ssim_gaussian` is.

    Raises ValueError where H or W is less than 7.
    """
    mean, everywhere = structural_similarity(image, truth, data_range=255, full=True)
    return float(mean) if valid is None else _mean(everywhere, valid, 7)


def ssim_gaussian(image: Image, truth: Image, valid: Valid | None = None) -> float | None:
    """Mean structural similarity of two (H, W) images as Wang et al. (2004) define it: an 11 x 11 Gaussian window with
    a standard deviation of 1.5 voxels, K1 = 0.01, K2 = 0.03, and covariances divided by the sum of the window's
    weights. The mean is over the windows that lie wholly inside the image.

    Raises ValueError where H or W is less than 11.
    """
    mean, everywhere = structural_similarity(
        image,
        truth,
        win_size=11,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        full=True,
    )
    return float(mean) if valid is None else _mean(everywhere, valid, 11)


def _mean(everywhere: NDArray[np.float64], valid: Valid, side: int) -> float | None:
    """The mean over windows of side x side voxels all of which are valid."""
    rows = sliding_window_view(valid, side, 0).all(-1)
    whole = sliding_window_view(rows, side, 1).all(-1)
    centres = everywhere[side // 2 : len(everywhere) - side // 2, side // 2 : everywhere.shape[1] - side // 2]
    return float(centres[whole].mean()) if whole.any() else None
