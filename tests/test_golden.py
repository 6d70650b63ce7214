"""The network against reference vectors of the authors' one (EMSR_SHARED/golden), its parameter counts, and what the
vectors do not reach."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import nn
from torch.nn import functional

from models import memory, weights
from models.config import X8, X8_SMALL, X16, X16_SMALL, Params, with_patch
from models.flow import MEAN, STD, SPyNet
from models.layers import GroupNorm, channels_last
from models.metadata import WeightsError
from models.network import SuperResolver

GOLDEN = SHARED / "golden"
NAMES = ["gpemsr_x8_16x24_seed1", "gpemsr_x16_16x16_seed1"]


def golden(name: str) -> tuple[Any, dict[str, torch.Tensor], SuperResolver]:
    """(arrays, the authors' dictionary as filled by the rule, our network without weights)."""
    if not (GOLDEN / f"{name}.npz").exists():
        pytest.skip(f"no reference vectors at {GOLDEN} (set EMSR_SHARED)")
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    arrays = np.load(GOLDEN / f"{name}.npz")
    state = {}
    for key, shape in json.loads(bytes(arrays["parameters_json"]).decode()).items():
        fixed = {"mean": MEAN, "std": STD}.get(key.rsplit(".", 1)[-1]) if "spynet" in key else None
        state[key] = torch.tensor(fixed).view(shape) if fixed else torch.from_numpy(rule.fill(key, tuple(shape), 1))
    return arrays, state, SuperResolver(X8 if "_x8_" in name else X16).eval()


@pytest.mark.parametrize("name", NAMES)
def test_reference_vectors(name: str) -> None:
    arrays, state, network = golden(name)
    weights.load_published(network, state)
    window = torch.from_numpy(arrays["input"])
    sections = window[0]
    with torch.inference_mode():
        reference = [network.prior(s[None]) for s in sections]
        features = [network.features(s[None]) for s in sections]
        masks = [network.mask(s[None], r.image) for s, r in zip(sections, reference, strict=True)]
        cosine = [network.mask.cosine(s[None], r.image) for s, r in zip(sections, reference, strict=True)]
        states = [network.encode_section(s[None]) for s in sections]
        aligned = network.pod(window, [s.pyramid for s in states])
        found = {
            "reference": torch.stack([r.image for r in reference], 1),
            "lr_features": torch.cat(features),
            "mask_cosine": torch.cat(cosine),
            "mask": torch.cat(masks),
            "mpf_output": torch.cat([s.pyramid[0] for s in states]),
            "aligned": aligned,
            "fused": network.fusion(aligned),
            "sr": network.fuse_window(states),
        }
        whole = network(window)
    for key, value in found.items():
        expected = arrays[key]
        assert np.abs(value.reshape(expected.shape).numpy() - expected).max() < 1e-4, key
    assert np.abs(whole.numpy() - arrays["sr"]).max() < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_reference_indices(name: str) -> None:
    """The codes that the indexer reads off each section equal the authors' exactly."""
    arrays, state, network = golden(name)
    weights.load_published(network, state)
    with torch.inference_mode():
        indices = torch.cat([network.prior.indices(s[None]) for s in torch.from_numpy(arrays["input"])[0]])
    assert (indices.reshape(arrays["indices"].shape).numpy() == arrays["indices"]).all()


def test_what_does_not_fit_is_named() -> None:
    _, state, network = golden(NAMES[0])
    key = next(k for k in state if k.startswith("recon_trunk"))
    for change, words in (
        ({key: None}, "missing"),
        ({key: torch.zeros(3)}, "of another shape"),
        ({"stranger": torch.zeros(3)}, "stranger"),
    ):
        broken = {k: v for k, v in (state | change).items() if v is not None}
        with pytest.raises(WeightsError, match=words):
            weights.load_published(network, broken)


def count(network: SuperResolver, trained: bool) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad == trained)


@pytest.mark.parametrize(("params", "trained", "paper"), [(X16, 5_610_430, 5.4627e6), (X8, 4_573_438, 4.4257e6)])
def test_parameter_counts_and_the_papers(params: Params, trained: int, paper: float) -> None:
    """The paper's numbers leave out the own weights and biases of the four deformable convolutions: 4 x (64 x 64 x 9 +
    64).
    """
    network = SuperResolver(params)
    assert count(network, True) == trained
    assert round((trained - 4 * (64 * 64 * 9 + 64)) / 1e6, 4) == paper / 1e6


@pytest.mark.parametrize("params", [X8_SMALL, X16_SMALL])
def test_small_presets_are_small(params: Params) -> None:
    network = SuperResolver(params)
    assert count(network, True) + count(network, False) <= 5_000_000


@pytest.mark.parametrize("params", [X8_SMALL, X16_SMALL])
def test_bands_of_rows_are_the_whole(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile so large that its maps are computed in bands gives what it gives at once."""
    torch.manual_seed(2)
    network = SuperResolver(params).eval()
    with torch.inference_mode():
        for parameter in network.reconstruct.parameters():
            parameter.mul_(3)
        sections = torch.rand(5, 1, 1, 24, 8)
        found = []
        for size in (memory.BAND_BYTES, 1):
            monkeypatch.setattr(memory, "BAND_BYTES", size)
            states = [network.encode_section(section) for section in sections]
            found.append([network.prior(sections[0]).image, states[0].pyramid[0], network.fuse_window(states)])
    for whole, banded in zip(*found, strict=True):
        assert torch.allclose(whole, banded, atol=1e-5)


def test_the_cosine_in_bands_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    mask = SuperResolver(X8).mask
    section, reference = torch.rand(1, 1, 8, 6), torch.rand(1, 1, 64, 48)
    with torch.inference_mode():
        whole = mask.cosine(section, reference)
        monkeypatch.setattr(memory, "BAND_BYTES", 1)
        assert torch.allclose(whole, mask.cosine(section, reference), atol=1e-6)


def test_flow_of_sections_that_are_no_multiple_of_32() -> None:
    """network.md, section 3: the sections are resized up to the next multiples, and the flow back, in their own
    voxels.
    """
    torch.manual_seed(0)
    network = SPyNet((8, 16, 16, 8), 6)
    first, second = torch.rand(2, 1, 40, 72), torch.rand(2, 1, 40, 72)

    def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return functional.interpolate(image, size=size, mode="bilinear", align_corners=False)

    with torch.no_grad():
        x, y = resized(network(resized(first, (64, 96)), resized(second, (64, 96))), (40, 72)).unbind(1)
        assert torch.allclose(network(first, second), torch.stack([x * 72 / 96, y * 40 / 64], 1), atol=1e-6)


@pytest.mark.parametrize(("params", "patch"), [(X16_SMALL, 8), (X16_SMALL, 64), (X8_SMALL, 8), (X8_SMALL, 64)])
def test_every_patch_of_table_3_is_a_network(params: Params, patch: int) -> None:
    """A prior with fewer levels than the fusion, or with more, gives SR and a reference of the right size."""
    torch.manual_seed(0)
    network = SuperResolver(with_patch(params, patch)).eval()
    with torch.inference_mode():
        sr, references = network.with_references(torch.rand(1, 5, 1, 8, 16))
    assert sr.shape == (1, 1, 1, 8 * params.scale, 16 * params.scale)
    assert references.shape == (1, 5, 1, 8 * params.scale, 16 * params.scale)


def test_group_norm_on_a_cpu() -> None:
    """Our sums are PyTorch's operator with an epsilon of 1e-6, also where the variance is as small as that; and a map
    that is the same everywhere gives the bias, although rounding makes its variance negative.
    """
    torch.manual_seed(0)
    norm = GroupNorm(8, 4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 8, 16, 16) * 1e-3
    with torch.no_grad():
        wanted = functional.group_norm(x, 4, norm.weight, norm.bias, 1e-6)
        assert torch.allclose(norm(x), wanted, atol=1e-4)
        flat = norm(torch.full((1, 8, 33, 33), 10.1))  # whose variance by these sums is less than -1e-6
    assert torch.allclose(flat, norm.bias.view(1, 8, 1, 1), atol=0.01)


@pytest.mark.parametrize("size", [(64, 200), (200, 64), (3, 5)])
def test_group_norm_of_a_large_mean(size: tuple[int, int]) -> None:
    """A mean of 1,000 deviations: at most twice the error of PyTorch's operator, both against float64. The map is read
    in several bands, the last of which is narrower.
    """
    torch.manual_seed(0)
    norm = GroupNorm(64, 32)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 64, *size) + 1000
    with torch.no_grad():
        exact = functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-6)
        error = (norm(channels_last(x)) - exact).abs().max()
        assert error <= 2 * (functional.group_norm(x, 32, norm.weight, norm.bias, 1e-6) - exact).abs().max()


def test_group_norm_of_bands_that_differ() -> None:
    """Half of the map is dark and half is bright: the variance is that between the bands."""
    norm = GroupNorm(64, 32)
    x = torch.cat([torch.zeros(1, 64, 100, 200), torch.full((1, 64, 100, 200), 6.0)], 2)
    with torch.no_grad():
        assert norm(channels_last(x)).flatten().unique().tolist() == pytest.approx([-1, 1], abs=1e-5)


def test_saved_weights_come_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, second = SuperResolver(X8_SMALL).eval(), SuperResolver(X8_SMALL).eval()
    metadata = weights.save(tmp_path / "w.safetensors", first, licence="CC BY 4.0")
    assert (metadata.scale, metadata.preset, metadata.licence) == (8, "small", "CC BY 4.0")
    assert weights.load(tmp_path / "w.safetensors", second) == metadata
    window = torch.rand(1, 5, 1, 16, 16)
    with torch.inference_mode():
        assert torch.equal(first(window), second(window))
