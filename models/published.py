"""Translates the authors' names of parameters (network.md, section 3, Checkpoints) into ours."""

from __future__ import annotations

import re

from torch import nn

from models.indexer import Indexer
from models.network import SuperResolver
from models.vqgan import VQGAN

BLOCK = {
    "block.0": "conv1",
    "block.1": "norm1",
    "block.3": "conv2",
    "block.4": "norm2",
    "channel_up": "skip",
    "gn": "norm",
    "proj_out": "project",
}
RULES: tuple[tuple[str, str], ...] = (
    # stages I and II, with the prefix that stage III gives them already taken off
    (r"(encoder|indexer)\.input_layer\.0\.", r"\1.input."),
    (r"(encoder|indexer)\.feat_extract\.(\d+)\.", r"\1.body.\2."),
    (r"(encoder|indexer)\.output_layer\.([012])\.", r"\1.head.\2."),
    (r"(encoder|indexer)\.output_layer\.3\.", r"\1.project."),
    (r"indexer\.embedding\.", r"indexer.logits."),
    (r"decoder\.input_layer\.0\.", r"decoder.project."),
    (r"decoder\.input_layer\.1\.", r"decoder.head.0."),
    (r"decoder\.input_layer\.2\.", r"decoder.head.1."),
    (r"decoder\.input_layer\.3\.", r"decoder.head.2."),
    (r"decoder\.feat_extract\.0\.", r"decoder.attention."),
    (r"decoder\.output_layer\.", r"decoder.output."),
    (r"codebook\.embedding\.", r"codebook."),
    # stage III
    (r"conv_first\.", r"features.input."),
    (r"feature_extraction\.(\d+)\.", r"features.blocks.\1."),
    (r"vgg\.slice1\.0\.", r"mask.features.conv1."),
    (r"vgg\.slice1\.2\.", r"mask.features.conv2."),
    (r"recon_trunk\.(\d+)\.", r"reconstruct.trunk.\1."),
    (r"HRconv\.", r"reconstruct.hr."),
    (r"conv_last\.", r"reconstruct.last."),
    (r"reduce_dim_conv\.", r"mpf.reduce."),
    (r"align_module\.spynet\.basic_module\.(\d+)\.basic_module\.(\d+)\.", r"pod.flow.levels.\1.\2."),
    (r"align_module\.cas_offset_conv([12])\.", r"pod.cascade.guide\1."),
    (r"align_module\.cas_dcnpack\.conv_offset\.", r"pod.cascade.deform.offsets."),
    (r"align_module\.cas_dcnpack\.", r"pod.cascade.deform."),
    (r"align_module\.L3_offset_conv2\.", r"pod.levels.2.guide3."),
    (r"ThreeDA\.temporal_attn1\.", r"fusion.query."),
    (r"ThreeDA\.temporal_attn2\.", r"fusion.key."),
    (r"ThreeDA\.feat_fusion\.", r"fusion.fuse."),
    (r"ThreeDA\.conv3D_([12])\.", r"fusion.mix\1.mix."),
    (r"ThreeDA\.conv3D_fusion_([12])\.", r"fusion.mix\1.reduce."),
    (r"ThreeDA\.conv2D_fusion_3\.", r"fusion.refine."),
    (r"ThreeDA\.spatial_attn_l([123])\.", r"fusion.spatial.low\1."),
    (r"ThreeDA\.spatial_attn_add([12])\.", r"fusion.spatial.add\1."),
    (r"ThreeDA\.spatial_attn([1-5])\.", r"fusion.spatial.conv\1."),
)
COUNTED: tuple[tuple[str, str, int, int], ...] = (
    # The authors' name, ours, then step and first number of the authors' numbering; ours is always 0, 1, 2, ...
    (r"decoder\.feat_extract\.([13579]|1[135])\.", "decoder.blocks.{}.", 2, 1),
    (r"decoder\.feat_extract\.([2468]|1[0246])\.", "decoder.ups.{}.", 2, 2),
    (r"refmaskconv(\d)\.", "mask.refine.{}.", 1, 1),
    (r"reffea_L(\d)_conv1\.", "mpf.up.{}.", 1, 2),
    (r"reffusionconv(\d)\.", "mpf.fuse.{}.conv.", 1, 1),
    (r"fusion_fea_block(\d)\.0\.", "mpf.fuse.{}.block.", 1, 1),
    (r"down_fea_conv(\d)\.", "mpf.down.{}.", 1, 1),
    (r"upconv(\d)\.", "reconstruct.up.{}.", 1, 1),
    (r"fea_L(\d)_conv1\.", "pod.halve.{}.0.", 1, 2),
    (r"fea_L(\d)_conv2\.", "pod.halve.{}.1.", 1, 2),
    (r"align_module\.flowdsconv(\d)_1\.", "pod.flow_down.0.{}.", 1, 0),
    (r"align_module\.flowdsconv(\d)_2\.", "pod.flow_down.1.{}.", 1, 0),
    (r"align_module\.L(\d)_offset_conv(?=1\.)", "pod.levels.{}.guide", 1, 1),
    (r"align_module\.L(\d)_offset_conv(?=[23]\.)", "pod.levels.{}.guide", 1, 1),
    (r"align_module\.L(\d)_dcnpack\.conv_offset\.", "pod.levels.{}.deform.offsets.", 1, 1),
    (r"align_module\.L(\d)_dcnpack\.", "pod.levels.{}.deform.", 1, 1),
    (r"align_module\.L(\d)_fea_conv\.", "pod.levels.{}.merge.", 1, 1),
)
UNUSED = (r"refmodel\.encoder\.", r"vgg\.slice[2-5]\.")
UNUSED_X8 = (r"reffea_L4_conv1\.", r"down_fea_conv3\.", r"reffusionconv4\.", r"fusion_fea_block4\.")


def ours(published: str, network: nn.Module) -> str:
    """The name of a published parameter in `network`, a SuperResolver, VQGAN or Indexer. An unknown name stays as it
    is.
    """
    if isinstance(network, Indexer):
        return _prior("indexer." + published).removeprefix("indexer.")
    if isinstance(network, VQGAN):
        return _prior(published)
    if published.startswith("refmodel."):
        return "prior." + _prior(published.removeprefix("refmodel."))
    return _rename(published)


def unused(published: str, network: nn.Module) -> bool:
    """Whether a tensor of the authors' file is never read, neither by their network nor by ours."""
    if not isinstance(network, SuperResolver):
        return False
    return any(re.match(rule, published) for rule in (*UNUSED, *(UNUSED_X8 if network.params.scale == 8 else ())))


def _prior(name: str) -> str:
    """The name of a parameter of stages I and II."""
    name = _rename(name)
    for theirs, mine in BLOCK.items():
        name = name.replace(f".{theirs}.", f".{mine}.")
    return re.sub(r"\.(downblock|upblock)\.", ".", name)


def _rename(name: str) -> str:
    """`name` with the beginning translated that the first matching rule names."""
    for rule, replacement in RULES:
        if re.match(rule, name):
            return re.sub("^" + rule, replacement, name)
    for rule, form, step, first in COUNTED:
        if found := re.match(rule, name):
            return form.format((int(found[1]) - first) // step) + name[found.end() :]
    return name
