"""Finds the weights of LPIPS and DISTS: heads in the packages that their authors publish, backbones in torchvision."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import Tensor

from models.metadata import WeightsError
from models.weights_file import read_state

State = dict[str, Tensor]


def lpips(backbone: str) -> State:
    """The weights that `perceptual.LPIPS` takes, for the backbone `alex` or `vgg`.

    Raises WeightsError where a package is not installed, OSError where a backbone cannot be downloaded.
    """
    return _torchvision({"alex": "AlexNet_Weights", "vgg": "VGG16_Weights"}[backbone]) | read_state(
        _inside("lpips", f"weights/v0.1/{backbone}.pth")
    )


def vgg16() -> State:
    """VGG16's weights for `perceptual.DISTS`. Raises OSError."""
    return _torchvision("VGG16_Weights")


def dists() -> State:
    """The weights `alpha` and `beta` of DISTS. Raises WeightsError."""
    return read_state(_inside("DISTS_pytorch", "weights.pt"))


def _torchvision(name: str) -> State:
    """ImageNet weights from torchvision's cache, where they are downloaded to and checked against their checksum."""
    from torchvision import models

    found: State = getattr(models, name).IMAGENET1K_V1.get_state_dict(
        progress=False, check_hash=True, weights_only=True
    )
    return found


def _inside(package: str, name: str) -> Path:
    """The path of a file of an installed package, which is not imported. Raises WeightsError."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"the package {package} is not installed. Run pip install 'emsr[evaluate]', or name the file under weights"
        )
    return Path(spec.submodule_search_locations[0]) / name
