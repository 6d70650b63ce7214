"""Whether SR looks like its truth only when one of them is turned over: a mistake that no metadata tell."""

from __future__ import annotations

import numpy as np

from pipeline.evaluation.volumes import SR, SectionImages
from pipeline.storage.volume import Uint8Array

MIN_GAIN = 0.3
"""How much more one must resemble the other when turned over than as it is."""


def likeness(images: SectionImages, last: Uint8Array) -> list[str]:
    """A remark where the first scored section resembles the truth mirrored or transposed, or its `last` section."""
    sr, truth = images.methods[SR], images.truth
    turned = {
        "mirrored in y": truth[::-1],
        "mirrored in x": truth[:, ::-1],
        "turned by 180 degrees": truth[::-1, ::-1],
        "with y and x exchanged": truth.T,
        "in reverse order of sections": last,
    }
    as_is = _correlation(sr, truth)
    found = {name: _correlation(sr, image) for name, image in turned.items() if image.shape == sr.shape}
    best = max(found, key=lambda name: found[name])
    if found[best] < as_is + MIN_GAIN:
        return []
    return [f"SR resembles the truth {best} (correlation {found[best]:.2f}) more than as it is ({as_is:.2f})"]


def _correlation(a: Uint8Array, b: Uint8Array) -> float:
    """Pearson's, 0 where either is constant."""
    x, y = (part.astype(np.float32) - part.mean() for part in (a, b))
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm else 0.0
