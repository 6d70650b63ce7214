"""From volume.yaml's `network` to a NetworkSpec: defaults filled in, the weights file found and hashed. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import models
from pipeline.base.errors import NetworkError, TransientError
from pipeline.config.volume import NetworkConfig
from pipeline.inference.weights import locate
from pipeline.plan.lattice import Lattice
from pipeline.plan.network_spec import NetworkSpec


def describe(config: NetworkConfig) -> NetworkSpec:
    """What volume.yaml asks for; what it does not say is the network's own lattice, float32 and a batch of one tile.

    Raises NetworkError for an unknown network, a halo too small, or weights that don't fit.
    """
    traits = models.NETWORKS.get(config.name)
    if traits is None:
        known = ", ".join(models.NETWORKS)
        raise NetworkError(
            f"network.name {config.name} is not in this version", f"one of {known}", "Set network.name to one of them"
        )
    cell = traits.cell if config.cell is None else config.cell
    halo = traits.halo[config.scale] if config.halo is None else config.halo
    if halo < traits.min_halo:
        raise NetworkError(
            f"network.halo {halo} would show the cell borders of {config.name}",
            f"at least {traits.min_halo} LR voxels",
            "Raise or remove network.halo",
        )
    lattice = Lattice(cell, halo, traits.window, traits.padding)
    if traits.weights:
        return _with_weights(config, lattice)
    given = [key for key in ("preset", "weights", "sha256") if getattr(config, key) is not None]
    if given:
        raise NetworkError(
            f"network.{given[0]} is set, but {config.name} has no weights", "", f"Remove network.{given[0]}"
        )
    if config.precision not in (None, "float32"):
        raise NetworkError(
            f"network.precision {config.precision} for {config.name}", "float32", "Remove network.precision"
        )
    if config.batch not in (None, 1):
        raise NetworkError(f"network.batch {config.batch} for {config.name}", "1", "Remove network.batch")
    return NetworkSpec(config.name, config.scale, None, "", "float32", lattice)


def _with_weights(config: NetworkConfig, lattice: Lattice) -> NetworkSpec:
    weights = config.weights
    if weights is None:
        raise NetworkError(
            f"network.weights is not given, and {config.name} needs weights",
            "builtin, or a weights file",
            "Give one of them",
        )
    builtin = weights.partition(":")[0] == "builtin"
    preset = config.preset or (models.BUILTIN_PRESET if builtin else "paper")
    file = weights
    if builtin:
        try:
            file = models.builtin(weights, config.scale).as_uri()
        except ValueError as error:
            raise NetworkError(
                f"network.weights: {error}", "one of them", "Set network.weights and network.scale to one of them"
            ) from None
    try:
        path, sha256 = locate(file, config.sha256)
    except TransientError as error:  # before the run nobody has fetched them yet: a mistyped host perhaps
        raise NetworkError(str(error), "", "Check the url and the network") from None
    licence = ""
    with as_network_errors():
        metadata = models.read_metadata(path) if models.is_ours(path) else None
    if metadata is not None:
        if (metadata.scale, metadata.preset) != (config.scale, preset):
            raise NetworkError(
                f"network.weights {path} is for scale {metadata.scale}, preset {metadata.preset or 'custom'}",
                f"scale {config.scale}, preset {preset}",
                "Set network.scale and network.preset to the file's, or take another file",
            )
        licence = metadata.licence
    precision, batch = config.precision or "float32", config.batch or 1
    return NetworkSpec(config.name, config.scale, preset, sha256, precision, lattice, weights, licence, batch)


def weights_path(spec: NetworkSpec) -> Path:
    """Where this machine has the weights; those that come with emsr lie where it is installed.

    Raises NetworkError where they are not there, or are not those of `spec`.
    """
    if spec.weights.partition(":")[0] != "builtin":
        return locate(spec.weights, spec.weights_sha256)[0]
    path, sha256 = locate(models.builtin(spec.weights, spec.scale).as_uri(), None)
    if sha256 != spec.weights_sha256:
        raise NetworkError(
            f"network.weights {spec.weights} of the emsr in {path.parent} has sha256 {sha256}",
            f"{spec.weights_sha256}, as where the run was started",
            "Install the same emsr in every process",
        )
    return path


@contextmanager
def as_network_errors() -> Iterator[None]:
    """What reading a weights file raises becomes a NetworkError."""
    try:
        yield
    except models.WeightsError as error:
        raise NetworkError(str(error)) from None
    except OSError as error:
        raise NetworkError(f"network.weights cannot be read: {error}", "a readable file", "Check the path") from None
