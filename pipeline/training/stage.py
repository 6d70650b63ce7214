"""A stage.yaml's networks with the weights they start from, and what is written of them afterwards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from models import weights
from models.config import Params, preset
from models.network import SuperResolver
from models.training import parts
from models.training.losses import Features
from models.training.parts import Part
from models.training.stages import FlowStage, IndexerStage, NetworkStage, Perceptual, Stage, VQGANStage
from models.vqgan import VQGAN
from pipeline.config.stage import StageConfig


def prepare(config: StageConfig) -> Stage:
    """Networks of the stage, weights from earlier stages put in. Raises WeightsError, OSError."""
    wanted, losses = params(config), config.losses
    perceptual = _perceptual(losses.lpips_alex)
    if config.stage == "flow":
        return FlowStage(wanted, config.flow_shift, config.flow_bend, config.seed)
    if config.stage == "vqgan":
        return VQGANStage(
            wanted,
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
    if config.stage == "indexer":
        vqgan = VQGAN(wanted.prior)
        part = _part(config, "vqgan")
        assert part is not None
        assert config.network.vqgan is not None
        parts.fill(vqgan, part, config.network.vqgan)
        return IndexerStage(wanted, vqgan)
    features = Features(weights.read_state(losses.vgg)) if losses.reference and losses.vgg else None
    stage = NetworkStage(
        wanted,
        config.centres,
        losses.squares,
        config.network.alone,
        losses.reference,
        features,
        losses.perceptual,
        perceptual,
    )
    network = stage.network
    assert isinstance(network, SuperResolver)
    if config.network.start is not None:
        parts.start_from(network, weights.read_state(config.network.start))
    if config.network.vgg19 is not None:
        weights.load_vgg19(network, weights.read_state(config.network.vgg19))
    paths = {kind: path for kind in ("vqgan", "indexer", "flow") if (path := getattr(config.network, kind)) is not None}
    flow = None if config.network.flow is None else parts.load_flow(config.network.flow, wanted)
    parts.assemble(network, _part(config, "vqgan"), _part(config, "indexer"), flow, paths)
    return stage


def params(config: StageConfig) -> Params:
    n = config.network
    return dataclasses.replace(preset(n.scale, n.preset), mpf=n.mpf, pod=n.pod, three_da=n.three_da)


def save(config: StageConfig, path: Path, network: nn.Module, facts: dict[str, Any]) -> None:
    """The trained weights as the next stage, or the pipeline, reads them; the card says how they came about."""
    told = facts | {"recipe": recipe(config)}
    if isinstance(network, SuperResolver):
        text = config.card + ("\n\n" if config.card else "") + json.dumps(told, sort_keys=True)
        weights.save(path, network, config.data.licence, text, half=config.half)
    else:
        parts.save_part(path, config.stage, params(config), config.data.licence, network, told)


def recipe(config: StageConfig) -> dict[str, Any]:
    """What decides the numbers, with files by their names alone: the same on every machine."""

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
    if path is None:
        return None
    from models.evaluation.perceptual import lpips_alex

    network = lpips_alex(path)
    network.requires_grad_(False)
    return network


def _part(config: StageConfig, kind: str) -> Part | None:
    path = getattr(config.network, kind)
    return None if path is None else parts.load_part(path, kind)
