"""What a GPU runs, as far as a machine without one can prove it: its operators give the CPU's numbers, none of them
makes the host wait, and how many there are.

A tensor on the device `meta` has no numbers, so whatever wants one of them fails; and the network takes the GPU's path
for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models import layers
from models.layers import GroupNorm, channels_last, conv3
from models.network import SuperResolver
from models.precision import lower
from models.reconstruct import shuffled

MADE_OF_NOTHING = {"empty", "empty_like", "new_empty", "_unsafe_view", "detach"}


MADE_BY_THE_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor, Tensor.item, Tensor.tolist)


class OnDevice(TorchFunctionMode):
    """Refuses what copies numbers of the host to the device, which a GPU waits for: they are in pageable memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in MADE_BY_THE_HOST, f"{func} copies from the host"
        if func is Tensor.__getitem__:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(place, (list, Tensor)) for place in places), "places that the host lists"
        return func(*args, **(kwargs or {}))


class Launches(TorchDispatchMode):
    """Counts what a GPU is asked to do, and refuses operators on what lies in the host's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for value in [*_tensors(args), *_tensors(kwargs or {}), *_tensors(out)]:
            assert value.device.type == "meta", f"{name} of a tensor in the host's memory"
        if not func.is_view and name not in MADE_OF_NOTHING:
            self.count[name] += 2 if name == "convolution" and args[2] is not None else 1  # a bias is added by itself
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def centre(network: nn.Module, batch: int, tile: int, cut: int) -> Launches:
    """One section encoded and one window fused, for a batch of tiles."""
    section = torch.empty(batch, 1, tile, tile, device="meta")
    with torch.no_grad():
        states = [network.encode_section(section)] * 5  # type: ignore[operator]
        network.fuse_window(states, cut)  # type: ignore[operator] # constants are made once
        with OnDevice(), Launches() as launches:
            network.encode_section(section)  # type: ignore[operator]
            sr = network.fuse_window(states, cut)  # type: ignore[operator]
    size = (tile - 2 * cut) * network.params.scale  # type: ignore[union-attr, operator]
    assert sr.shape == (batch, 1, size, size)
    assert sr.dtype == torch.float32
    return launches


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize(("preset", "scale", "tile", "batch", "most"), [
    ("paper", 8, 96, 8, 170), ("paper", 8, 160, 4, 340), ("paper", 16, 112, 8, 180), ("small", 8, 96, 8, 180),
])  # fmt: skip
def test_nothing_waits_and_launches_per_centre(
    preset: str, scale: int, tile: int, batch: int, most: int, precision: str
) -> None:
    """Some more are counted than a GPU has: convolutions of the device meta forget the layout of their kernels, and
    what follows turns maps over.
    """
    network = models.build("gpemsr", scale, preset).eval()
    lower(network, precision)
    launches = centre(network.to("meta"), batch, tile, 16)
    assert sum(launches.count.values()) / batch <= most, launches.count.most_common(12)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: torch.tensor([1.0, 2.0], device="meta"),
        lambda x: x * x.new_tensor([1.0, 2.0]),
        lambda x: torch.as_tensor(3.0, device="meta"),
        lambda x: x[[0, 1]],
        lambda x: x.sum().item(),
    ],
)
def test_what_makes_the_host_wait_is_refused(waits: Callable[[Tensor], Any]) -> None:
    """The refusal above can fail. The device meta itself refuses most of what reads a number, but not all."""
    with pytest.raises(AssertionError), OnDevice(), Launches():
        waits(torch.ones(2, device="meta"))


@pytest.mark.parametrize("copies", [lambda x: torch.ones(2) + 1, lambda x: torch.zeros(2).to("meta")])
def test_operators_in_the_hosts_memory_are_refused(copies: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="in the host's memory"), OnDevice(), Launches():
        copies(torch.ones(2, device="meta"))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_group_norm_by_channels(kind: torch.dtype) -> None:
    """It is PyTorch's, with large means too, keeps maps channels-last, and takes a convolution's bias into them."""
    torch.manual_seed(0)
    norm, conv = GroupNorm(64, 32), conv3(16, 64)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    nn.init.normal_(conv.bias, std=3)  # type: ignore[arg-type]
    conv = conv.to(kind)
    x = channels_last(torch.randn(3, 16, 24, 20)).to(kind)
    with torch.no_grad():
        plain = functional.conv2d(x, conv.weight, None, padding=1)
        limit = 1e-5 if kind == torch.float32 else 0.04  # a bfloat16 between 4 and 8 is rounded by up to 0.016
        for bias in (conv.bias, None):
            shifted = plain.double() + (0 if bias is None else bias.double().view(-1, 1, 1))
            wanted = functional.group_norm(shifted, 32, norm.weight.double(), norm.bias.double(), norm.eps)
            found = norm.by_channels(plain, bias)
            assert found.dtype == kind
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert (found.double() - wanted).abs().max() < limit


def test_shuffling_keeps_the_layout() -> None:
    """It moves what PyTorch's operator moves. The device meta has no numbers, so its lines are called here."""
    x = channels_last(torch.randn(2, 12, 3, 5))
    wanted = functional.pixel_shuffle(x, 2)
    on_gpu = Mock(wraps=x, device=torch.device("cuda"), shape=x.shape)
    found = shuffled(on_gpu)
    assert torch.equal(found, wanted)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_path_gives_the_cpus_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operators that a GPU takes, here computed by the CPU, with everything that is by hand switched off."""
    torch.manual_seed(0)
    network = models.build("gpemsr", 8, "small").eval()
    assert isinstance(network, SuperResolver)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".deform.offsets.weight" in name:
                parameter.uniform_(-0.1, 0.1)
            elif name.startswith("reconstruct.last"):
                parameter.mul_(30)
    sections = torch.rand(5, 2, 1, 32, 32)
    with torch.no_grad():
        wanted = network.fuse_window([network.encode_section(section) for section in sections], 8)
        for module in ("models.layers", "models.deformable"):
            monkeypatch.setattr(f"{module}.by_hand", lambda x: False)
        monkeypatch.setattr(GroupNorm, "_in_bands", GroupNorm.by_channels)
        monkeypatch.setattr(layers, "band_rows", lambda *_: 1 << 30)
        found = network.fuse_window([network.encode_section(section) for section in sections], 8)
    assert not torch.equal(found, wanted)
    assert (found - wanted).abs().max() < 1e-4


def test_lower_precision_keeps_indices_and_55_db() -> None:
    """bfloat16 with trained weights: no index changes, and what is stored in it is what costs nothing."""
    network = models.build("gpemsr", 8, "small").eval()
    models.load(models.builtin("builtin", 8), network)
    narrow = models.build("gpemsr", 8, "small").eval()
    models.load(models.builtin("builtin", 8), narrow)
    lower(narrow, "bfloat16")
    torch.manual_seed(0)
    sections = functional.interpolate(torch.rand(5, 1, 12, 12), scale_factor=4, mode="bicubic").clamp_(0, 1)
    with torch.no_grad():
        wide = network.fuse_window([network.encode_section(section[None]) for section in sections], 8)
        states = [narrow.encode_section(section[None]) for section in sections]  # type: ignore[operator]
        sr = narrow.fuse_window(states, 8)  # type: ignore[operator]
        assert torch.equal(network.prior.indices(sections), narrow.prior.indices(sections))  # type: ignore[union-attr, operator]
    assert {state.dtype for state in states[0].pyramid} == {torch.bfloat16}
    assert not torch.equal(wide, sr)
    assert -10 * (wide - sr).square().mean().log10() > 60
