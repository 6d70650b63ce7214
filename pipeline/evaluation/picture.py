"""One row of the picture of scored volumes: LR, bicubic, SR, truth and the error of SR, in the middle of a section."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.evaluation.volumes import BICUBIC, SR, SectionImages
from pipeline.viewer.contact_sheet import SIDE, heat

MAX_ERROR = 96
"""Grey levels of |SR - truth| that are shown brightest."""

Panel = tuple[str, Image.Image]
"""A caption and what it is the caption of."""


def panels(title: str, images: SectionImages) -> list[Panel]:
    """The panels of one section, from left to right, at most SIDE voxels across. `title` heads the first of them."""
    truth = images.truth
    height, width = (min(SIDE, n) for n in truth.shape)
    top, left = ((n - m) // 2 for n, m in zip(truth.shape, (height, width), strict=True))
    middle = (slice(top, top + height), slice(left, left + width))
    row: list[Panel] = []
    if images.lr is not None:
        nearest = Image.fromarray(images.lr).resize(truth.shape[::-1], Image.Resampling.NEAREST)
        row = [
            (f"{title}: LR", Image.fromarray(np.asarray(nearest)[middle])),
            (BICUBIC, Image.fromarray(images.methods[BICUBIC][middle])),
        ]
    sr = images.methods[SR]
    error = np.abs(sr.astype(np.int16) - truth)[middle].astype(np.uint8)
    return [
        *row,
        (SR, Image.fromarray(sr[middle])),
        ("ground truth", Image.fromarray(truth[middle])),
        (f"|SR - truth|, 0 to {MAX_ERROR} grey levels", heat(error, MAX_ERROR)),
    ]
