"""SPyNet's original Torch7 files, written here as Torch7 writes them: read, refused, and named in a stage.yaml."""

from __future__ import annotations

import struct
import sys
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import weights
from models.config import X8, X8_SMALL
from models.flow import SPyNet
from models.metadata import WeightsError
from models.training import parts


class Writer:
    """Torch7's binary format: a type code, then for tables and objects their number, so that each is written once."""

    def __init__(self) -> None:
        self._numbers, self.bytes = count(1), b""

    def _int(self, *values: int) -> None:
        self.bytes += struct.pack(f"<{len(values)}i", *values)

    def number(self, value: float) -> None:
        self.bytes += struct.pack("<id", 1, value)

    def string(self, text: str) -> None:
        self._int(2, len(text))
        self.bytes += text.encode()

    def _object(self, name: str) -> None:
        self._int(4, next(self._numbers))
        for text in ("V 1", name):
            self._int(len(text))
            self.bytes += text.encode()

    def tensor(self, values: np.ndarray, kind: str) -> None:
        self._object(f"torch.{kind}Tensor")
        self._int(values.ndim)
        strides = [s // values.itemsize for s in values.strides]
        self.bytes += struct.pack(f"<{2 * values.ndim + 1}q", *values.shape, *strides, 1)
        self._object(f"torch.{kind}Storage")
        self.bytes += struct.pack("<q", values.size) + values.tobytes()

    def table(self, size: int) -> None:
        self._int(3, next(self._numbers), size)

    def module(self, name: str, fields: int) -> None:
        self._object(name)
        self.table(fields)

    def convolution(self, module: nn.Conv2d, name: str, flat: bool, kind: str) -> None:
        weight = module.weight.detach().numpy().astype(np.float64 if kind == "Double" else np.float32)
        self.module(name, 3)
        self.string("nInputPlane")
        self.number(module.in_channels)
        self.string("weight")
        self.tensor(weight.reshape(len(weight), -1) if flat else weight, kind)
        self.string("bias")
        self.tensor(module.bias.detach().numpy().astype(weight.dtype), kind)


def level_file(
    level: nn.Sequential,
    backend: str = "nn",
    flat: bool = False,
    kind: str = "Float",
    parallel: bool = False,
    other: str = "ReLU",
) -> bytes:
    writer = Writer()
    for name in ["nn.DataParallelTable"] * parallel + ["nn.Sequential"]:
        writer.module(name, 1)
        writer.string("modules")
        writer.table(1 if name == "nn.DataParallelTable" else len(level))
        if name == "nn.DataParallelTable":
            writer.number(1)
    for i, module in enumerate(level, start=1):
        writer.number(i)
        if isinstance(module, nn.Conv2d):
            writer.convolution(module, f"{backend}.SpatialConvolution{'MM' if flat else ''}", flat, kind)
        else:
            writer.module(f"{backend}.{other}", 1)
            writer.string("inplace")
            writer.bytes += struct.pack("<ii", 5, 1)
    return writer.bytes


@pytest.fixture(scope="module")
def spynet() -> SPyNet:
    torch.manual_seed(3)
    return SPyNet(X8.flow_widths, 6)


def write_set(folder: Path, network: SPyNet, suffix: str = "_F", levels: int = 6, **how: object) -> None:
    for i, level in enumerate(network.levels[:levels], start=1):
        (folder / f"modelL{i}{suffix}.t7").write_bytes(level_file(level, **how))


@pytest.mark.parametrize(
    "how", [{}, {"flat": True}, {"backend": "cudnn", "kind": "Cuda", "parallel": True}, {"kind": "Double"}], ids=str
)
def test_each_level_is_one_file(tmp_path: Path, spynet: SPyNet, how: dict[str, object]) -> None:
    write_set(tmp_path, spynet, **how)
    state = weights.read_spynet(tmp_path)
    wanted = spynet.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_the_sets_trained_on_chairs_give_their_fifth_level_twice(tmp_path: Path, spynet: SPyNet) -> None:
    write_set(tmp_path, spynet, "_4", levels=5)
    state = weights.read_spynet(tmp_path)
    assert torch.equal(state["levels.5.8.bias"], spynet.state_dict()["levels.4.8.bias"])


def test_one_set_of_several_is_named_by_one_of_its_files(tmp_path: Path, spynet: SPyNet) -> None:
    other = SPyNet(X8.flow_widths, 6)
    write_set(tmp_path, spynet)
    write_set(tmp_path, other, "_C")
    with pytest.raises(WeightsError, match=r"2 sets .* modelL1_C\.t7, modelL1_F\.t7"):
        weights.read_spynet(tmp_path)
    assert torch.equal(weights.read_spynet(tmp_path / "modelL3_C.t7")["levels.0.0.weight"], other.levels[0][0].weight)


def test_files_that_will_not_do(tmp_path: Path, spynet: SPyNet) -> None:
    with pytest.raises(WeightsError, match="levels none; wanted 1 to 6"):
        weights.read_spynet(tmp_path)
    write_set(tmp_path, spynet, levels=4)
    with pytest.raises(WeightsError, match=r"levels \[1, 2, 3, 4\]"):
        weights.read_spynet(tmp_path)
    write_set(tmp_path, spynet)
    whole = (tmp_path / "modelL2_F.t7").read_bytes()
    (tmp_path / "modelL2_F.t7").write_bytes(level_file(spynet.levels[1], other="SpatialBatchNormalization"))
    with pytest.raises(WeightsError, match=r"modelL2_F\.t7 holds a nn\.SpatialBatchNormalization"):
        weights.read_spynet(tmp_path)
    for cut in (0, 1, len(whole) // 2, len(whole) - 4):  # the last one is cut within a storage
        (tmp_path / "modelL2_F.t7").write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=r"modelL2_F\.t7 cannot be read as a Torch7 file"):
            weights.read_spynet(tmp_path)
    with pytest.raises(WeightsError, match="no file of SPyNet's"):
        weights.read_spynet(tmp_path / "model_1.t7")


def test_without_torchfile_the_message_says_what_to_install(
    tmp_path: Path, spynet: SPyNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path, spynet)
    monkeypatch.setitem(sys.modules, "torchfile", None)
    with pytest.raises(WeightsError, match=r"pip install 'emsr\[train\]'"):
        weights.read_spynet(tmp_path)


def test_the_flow_of_a_stage_may_be_any_of_them(tmp_path: Path, spynet: SPyNet) -> None:
    """BasicSR's names in a .pth, the original folder, and what stage flow wrote give the same part; preset small takes
    the last only.
    """
    theirs = {name.replace("levels.", "basic_module.", 1): value for name, value in spynet.state_dict().items()}
    theirs = {
        ".".join([*name.split(".")[:2], "basic_module", *name.split(".")[2:]]): value for name, value in theirs.items()
    }
    torch.save({"params": theirs | {"mean": torch.zeros(1, 3, 1, 1)}}, tmp_path / "spynet.pth")
    (tmp_path / "t7").mkdir()
    write_set(tmp_path / "t7", spynet)
    parts.save_part(tmp_path / "last.safetensors", parts.Part("flow", X8, "CC0-1.0", spynet.state_dict(), {}))
    for name in ("spynet.pth", "t7", "last.safetensors"):
        network = SPyNet(X8.flow_widths, 6)
        parts.fill(network, parts.load_flow(tmp_path / name, X8), tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), spynet.parameters(), strict=True))
    for name in ("spynet.pth", "t7"):
        with pytest.raises(WeightsError, match="preset paper only"):
            parts.load_flow(tmp_path / name, X8_SMALL)
    with pytest.raises(WeightsError, match="Train stage flow first"):
        parts.load_flow(tmp_path / "nowhere.safetensors", X8)


def test_convolutions_are_those_of_the_paper(spynet: SPyNet) -> None:
    widths = [m.in_channels for m in spynet.levels[0] if isinstance(m, nn.Conv2d)]
    assert [*pairwise([*widths, 2])] == [(8, 32), (32, 64), (64, 32), (32, 16), (16, 2)]
