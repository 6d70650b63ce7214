"""A stage.yaml's networks with the weights they start from, and the files of weights that are written of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from models import weights
from models.config import Params, preset
from models.metadata import WeightsError
from models.network import SuperResolver
from models.training import parts
from models.training.losses import Features
from models.training.parts import Part
from models.training.stages import FlowStage, IndexerStage, NetworkStage, Perceptual, Stage, VQGANStage
from models.vqgan import VQGAN
from models.weights_file import read_state
from pipeline.config.stage import StageConfig


def prepare(config: StageConfig) -> Stage:
    """Networks of the stage, weights from earlier stages put in.

    Raises WeightsError or ValueError where a file holds other weights, OSError where it cannot be read.
    """
    perceptual = _perceptual(config.losses.lpips_alex)
    if config.stage == "flow":
        return FlowStage(params(config), config.flow_shift, config.flow_bend, config.seed)
    if config.stage == "vqgan":
        return _vqgan_stage(config, perceptual)
    if config.stage == "indexer":
        return _indexer_stage(config)
    return _network_stage(config, perceptual)


def _vqgan_stage(config: StageConfig, perceptual: Perceptual | None) -> VQGANStage:
    losses = config.losses
    return VQGANStage(
        params(config),
        losses.codebook,
        losses.adversarial,
        losses.adversarial_from,
        perceptual_weight=losses.perceptual,
        perceptual=perceptual,
        quantise_from=config.quantise_from,
        revive_every=config.revive_every,
        critic_width=losses.critic_width,
        seed=config.seed,
    )


def _indexer_stage(config: StageConfig) -> IndexerStage:
    vqgan = VQGAN(params(config).prior)
    part = _part(config, "vqgan")
    assert part is not None
    assert config.network.vqgan is not None
    parts.fill(vqgan, part, config.network.vqgan)
    return IndexerStage(params(config), vqgan)


def _network_stage(config: StageConfig, perceptual: Perceptual | None) -> NetworkStage:
    losses, files = config.losses, config.network
    stage = NetworkStage(
        params(config),
        config.centres,
        losses.squares,
        files.alone,
        losses.reference,
        Features(read_state(losses.vgg)) if losses.reference and losses.vgg else None,
        losses.perceptual,
        perceptual,
    )
    network = stage.network
    assert isinstance(network, SuperResolver)
    if files.start is not None:
        taken, trained = parts.start_from(network, read_state(files.start))
        if not taken:
            raise WeightsError(f"{files.start} has no tensor that fits this network. Name weights of stage network")
        if taken < trained:
            print(f"emsr: network.start: {taken} of {trained} trained tensors fit this network", file=sys.stderr)
    if files.vgg19 is not None:
        weights.load_vgg19(network, read_state(files.vgg19))
    paths = {kind: path for kind in ("vqgan", "indexer", "flow") if (path := getattr(files, kind)) is not None}
    flow = None if files.flow is None else parts.load_flow(files.flow, params(config))
    parts.assemble(network, _part(config, "vqgan"), _part(config, "indexer"), flow, paths)
    return stage


def params(config: StageConfig) -> Params:
    """The network's numbers: those of its preset, with the blocks that stage.yaml leaves out."""
    n = config.network
    return dataclasses.replace(preset(n.scale, n.preset), mpf=n.mpf, pod=n.pod, three_da=n.three_da)


def save(config: StageConfig, name: str, network: nn.Module, facts: dict[str, Any]) -> None:
    """Write the trained weights to `name`.safetensors in config.output, as the next stage or the pipeline reads them.

    `facts` (steps, scores) and the recipe go into the file's card. The file appears whole or not at all.
    """
    unfinished = config.output / f"{name}.unfinished"
    card = facts | {"recipe": recipe(config)}
    try:
        if isinstance(network, SuperResolver):
            text = config.card + ("\n\n" if config.card else "") + json.dumps(card, sort_keys=True)
            weights.save(unfinished, network, config.data.licence, text, half=config.half)
        else:
            part = Part(config.stage, params(config), config.data.licence, network.state_dict(), card)
            parts.save_part(unfinished, part)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(config.output / f"{name}.safetensors")
    finally:
        unfinished.unlink(missing_ok=True)


def contents(config: StageConfig) -> dict[str, str]:
    """What lies in the files that the stage starts from and measures with, by their dotted keys of stage.yaml."""
    files = {f"network.{key}": getattr(config.network, key) for key in ("vqgan", "indexer", "flow", "vgg19", "start")}
    files |= {f"losses.{key}": getattr(config.losses, key) for key in ("vgg", "lpips_alex")}
    return {key: f"file {_sha256(path)[:16]}" for key, path in files.items() if path is not None and path.exists()}


def _sha256(path: Path) -> str:
    """SHA-256 of a file; of all files of a folder, and of all levels where one of SPyNet's is named."""
    if path.is_dir():
        files = sorted(child for child in path.iterdir() if child.is_file())
    else:
        files = sorted(path.parent.glob("*.t7")) if path.suffix == ".t7" else [path]
    total = hashlib.sha256()
    for part in files:
        with part.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def recipe(config: StageConfig) -> dict[str, Any]:
    """The keys of stage.yaml that decide the weights, with files by their names alone: the same on every machine."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: named(v) for k, v in value.items() if k not in ("card", "output")}
        if isinstance(value, (list, tuple)):
            return [named(v) for v in value]
        if isinstance(value, Path) or (isinstance(value, str) and value.startswith("file://")):
            return str(value).rstrip("/").rpartition("/")[2]
        return value

    plain: dict[str, Any] = named(config.model_dump(exclude_defaults=True))
    return plain


def _perceptual(path: Path | None) -> Perceptual | None:
    """LPIPS with the weights in `path`, frozen; None without a path."""
    if path is None:
        return None
    from models.evaluation.perceptual import lpips_alex

    network = lpips_alex(path)
    network.requires_grad_(False)
    return network


def _part(config: StageConfig, kind: str) -> Part | None:
    """What an earlier stage wrote of `kind` (vqgan, indexer); None where stage.yaml names no file."""
    path = getattr(config.network, kind)
    return None if path is None else parts.load_part(path, kind)
