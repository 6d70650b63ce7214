"""The metrics that table.yaml can name: (image, truth, what of them is scored) -> score.

A new one goes into `_metric`, and its name into config/table.py and models/evaluation/table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models import WeightsError
from models.evaluation import fidelity
from pipeline.base.errors import NetworkError
from pipeline.config.table import WeightsConfig
from pipeline.evaluation.scored_voxels import Valid
from pipeline.storage.volume import Uint8Array

Metric = Callable[[Uint8Array, Uint8Array, Valid | None], float | None]
"""The score of an image (y, x) against its truth of the same shape, where a mask of that shape is True (None: all).

It is None where too little is left to score.
"""


def metrics(names: Sequence[str], weights: WeightsConfig) -> dict[str, Metric]:
    """The named metrics, their networks loaded. Raises NetworkError where weights cannot be read or fetched."""
    return {name: _metric(name, weights) for name in names}


def _metric(name: str, weights: WeightsConfig) -> Metric:
    if name in ("psnr", "ssim", "ssim_gaussian"):
        metric: Metric = getattr(fidelity, name)
        return metric
    import torch

    from models.evaluation import perceptual

    files: dict[str, list[Path | None]] = {
        "lpips_alex": [weights.lpips_alex],
        "lpips_vgg": [weights.vgg16],
        "dists": [weights.vgg16, weights.dists],
    }
    try:
        network: Any = getattr(perceptual, name)(*files[name])
    except (OSError, WeightsError) as error:
        fetched = None in files[name]
        raise NetworkError(
            f"weights of {name} cannot be {'fetched' if fetched else 'read'}: {error}",
            "the files of docs/evaluation.md",
            "Name them under weights" if fetched else "Check the paths",
        ) from None

    def score(image: Uint8Array, truth: Uint8Array, valid: Valid | None) -> float | None:
        if valid is not None and not valid.all():
            return None  # such a network sees a section as a whole
        with torch.no_grad():
            pair = [torch.tensor(part)[None, None].float() / 255 for part in (image, truth)]
            return float(network(*pair))

    return score
