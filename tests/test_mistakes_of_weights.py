"""Law 7 for files of weights: what is no good is refused in a line or two, what others save around them is taken off.

Every process of a run opens weights by `describe` and `Network`, before anything is written.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import texture, tree, volume_yaml, write_lr
from safetensors.torch import save_file
from torch import nn

import models
from models import weights
from models.config import preset
from models.network import SuperResolver
from models.training import parts
from models.vqgan import VQGAN
from pipeline import doctor, run
from pipeline.base.command import guarded
from pipeline.config.volume import load
from pipeline.inference.describe import describe
from pipeline.inference.network import Network

KEYS = {"network__name": "gpemsr", "network__preset": "small", "network__cell": 16}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
PAGE = b"<!DOCTYPE html><html><body>404: Not Found</body></html>"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def network() -> SuperResolver:
    torch.manual_seed(5)
    found = models.build("gpemsr", 8, "small")
    assert isinstance(found, SuperResolver)
    return found


@pytest.fixture(scope="module")
def state(network: SuperResolver) -> State:
    return dict(network.state_dict())


def opened(folder: Path, name: str, **keys: Any) -> tuple[int, list[Network]]:
    """The exit code of opening network.weights `name` as a run does, and the network where it could be."""
    found: list[Network] = []
    path = volume_yaml(folder / "volume.yaml", "lr.zarr", "sr", **(KEYS | {"network__weights": name} | keys))

    def work() -> int:
        found.append(Network(describe(load(path).network)))
        return 0

    return guarded(work), found


def saved(path: Path, what: object, **options: Any) -> bytes:
    torch.save(what, path, **options)
    return path.read_bytes()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def of_scale_16(path: Path) -> None:
    torch.save(models.build("gpemsr", 16, "small").state_dict(), path)


def stage_i(path: Path) -> None:
    torch.save(VQGAN(preset(8, "small").prior).state_dict(), path)


def part(path: Path) -> None:
    vqgan = VQGAN(preset(8, "small").prior)
    parts.save_part(path, parts.Part("vqgan", preset(8, "small"), "CC0", vqgan.state_dict(), {}))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "weights")


MISTAKES: list[tuple[str, Callable[[Path, SuperResolver], Any], str]] = [
    ("a.pth", lambda p, n: p.write_bytes(b""), "is empty (0 bytes)"),
    ("a.safetensors", lambda p, n: p.write_bytes(b""), "is empty (0 bytes)"),
    ("cut.pth", lambda p, n: p.write_bytes(saved(p, n.state_dict())[:-100]), "damaged or cut short"),
    ("half.pth", lambda p, n: p.write_bytes(saved(p, n.state_dict())[: 1 << 20]), "damaged or cut short"),
    ("flip.pth", lambda p, n: p.write_bytes(flipped(saved(p, n.state_dict()), 1 << 20)), "Bad CRC-32"),
    (
        "old.pth",
        lambda p, n: p.write_bytes(saved(p, n.state_dict(), _use_new_zipfile_serialization=False)[: 1 << 20]),
        "cannot be read as weights: unexpected EOF",
    ),
    ("page.pth", lambda p, n: p.write_bytes(PAGE), "is a web page"),
    ("page.safetensors", lambda p, n: p.write_bytes(PAGE), "is a web page"),
    ("lfs.pth", lambda p, n: p.write_bytes(LFS), "git lfs pull"),
    ("lfs.safetensors", lambda p, n: p.write_bytes(LFS), "git lfs pull"),
    ("text.pt", lambda p, n: p.write_bytes(b"weights"), "no PyTorch file"),
    ("zip.pth", lambda p, n: zipped(p), "a zip archive of other files (readme.txt)"),
    ("folder.pth", lambda p, n: p.mkdir(), "is a folder"),
    ("a.zip", lambda p, n: zipped(p), "no known ending"),
    ("module.pth", lambda p, n: torch.save(n, p), "a pickled object (models.network.SuperResolver)"),
    ("list.pth", lambda p, n: torch.save([1, 2], p), "no dictionary"),
    ("numbers.pth", lambda p, n: torch.save({"epoch": 3, "best": 1.0}, p), "a dictionary of epoch, best"),
    ("x16.pth", lambda p, n: of_scale_16(p), "weights of scale 16, preset small. Set network.scale"),
    ("stage1.pth", lambda p, n: stage_i(p), "stage I (VQGAN) alone. Name those of stage III"),
    ("part.safetensors", lambda p, n: part(p), "what stage vqgan trained, a part of the network"),
    ("fewer.pth", lambda p, n: torch.save(dict([*n.state_dict().items()][3:]), p), "3 missing: features.input.weight"),
    (
        "more.pth",
        lambda p, n: torch.save(n.state_dict() | {"classes": torch.ones(1)}, p),
        "1 not of this network: classes",
    ),
    (
        "shape.pth",
        lambda p, n: torch.save(n.state_dict() | {"features.input.bias": torch.ones(5)}, p),
        "1 of another shape: features.input.bias is (5,), wanted (32,)",
    ),
    (
        "nan.safetensors",
        lambda p, n: save_file({"features.input.bias": torch.full((32,), torch.nan)}, p),
        "not finite, in features.input.bias",
    ),
    (
        "integers.pth",
        lambda p, n: torch.save(n.state_dict() | {"features.input.bias": torch.ones(32, dtype=torch.int64)}, p),
        "1 no floating numbers: features.input.bias",
    ),
]


@pytest.mark.parametrize(("name", "write", "words"), MISTAKES, ids=[name for name, _, _ in MISTAKES])
def test_what_is_no_good_is_named(
    name: str,
    write: Callable[[Path, SuperResolver], Any],
    words: str,
    network: SuperResolver,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / name, network)
    code, _ = opened(tmp_path, name)
    said = capsys.readouterr().err
    assert code == 2, said
    assert words in said
    assert name in said
    assert "Traceback" not in said
    assert "weights_only" not in said, "torch's advice to load pickles"
    assert len(said.splitlines()) <= 2
    assert len(said) < 600


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("no.pth", "is not there"),
        ("$HOME/no.pth", "$NAME is not replaced"),
        ("~nosuchuser/no.pth", "a path written out, as this machine knows no home for its ~"),
        ("x" * 300 + ".pth", "a path whose names have at most 255 bytes"),
        ("~/no-such-folder/no.pth", f"{Path.home()}/no-such-folder/no.pth is not there"),
    ],
)
def test_paths_that_lead_nowhere(name: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opened(tmp_path, name)[0] == 2
    assert wanted in capsys.readouterr().err


def other_weights(tmp_path: Path, network: SuperResolver, at: int) -> Path:
    path = tmp_path / "ours.safetensors"
    weights.save(path, network, "CC0")
    path.write_bytes(flipped(path.read_bytes(), at))
    return path


def test_a_flipped_bit_in_a_file_of_ours(
    network: SuperResolver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_weights(tmp_path, network, -1000)
    assert opened(tmp_path, "ours.safetensors")[0] == 2
    assert "sha256 differs" in capsys.readouterr().err
    other_weights(tmp_path, network, 9)
    assert opened(tmp_path, "ours.safetensors")[0] == 2
    assert "head is not JSON" in capsys.readouterr().err


def test_a_flipped_bit_in_a_part(tmp_path: Path) -> None:
    part(tmp_path / "vqgan.safetensors")
    data = (tmp_path / "vqgan.safetensors").read_bytes()
    (tmp_path / "vqgan.safetensors").write_bytes(flipped(data, len(data) - 1000))
    with pytest.raises(models.WeightsError, match="sha256 differs"):
        parts.load_part(tmp_path / "vqgan.safetensors", "vqgan")


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


WRAPPED: dict[str, Callable[[State], object]] = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s},
    "net": lambda s: {"net": s, "optimizer": {"lr": 1e-4}},
    "generator": lambda s: {"generator": s, "discriminator": {"conv.weight": torch.ones(1)}},
    "averaged first": lambda s: {"params": {n: v * 0 for n, v in s.items()}, "params_ema": s},
    "module": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled and parallel": lambda s: {"state_dict": prefixed(s, "_orig_mod.module.")},
    "parallel and compiled": lambda s: {"model": {"state_dict": prefixed(s, "module._orig_mod.")}},
    "lightning": lambda s: {"state_dict": prefixed(s, "model.")},
    "float64": lambda s: {n: v.double() for n, v in s.items()},
}


@pytest.mark.parametrize("how", list(WRAPPED))
def test_what_is_around_the_tensors_is_taken_off(how: str, state: State, tmp_path: Path) -> None:
    torch.save(WRAPPED[how](state), tmp_path / "theirs.pth")
    code, (found,) = opened(tmp_path, "theirs.pth")
    assert code == 0
    assert all(torch.equal(value, state[name]) for name, value in found.module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_computed_with_in_float32(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    narrow = {name: value.to(dtype).contiguous() for name, value in state.items()}
    torch.save(narrow, tmp_path / "narrow.pth")
    save_file(narrow, tmp_path / "narrow.safetensors")
    for name in ("narrow.pth", "narrow.safetensors"):
        _, (found,) = opened(tmp_path, name)
        assert all(torch.equal(v, narrow[n].float()) for n, v in found.module.state_dict().items())


def test_an_archive_whose_crcs_were_not_counted(state: State, tmp_path: Path) -> None:
    """torch.save can leave them out; such a file is no damaged one."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "quick.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "quick.pth") as records:
        assert records.testzip() is not None
    assert opened(tmp_path, "quick.pth")[0] == 0


def test_a_sha256_in_capitals(network: SuperResolver, tmp_path: Path) -> None:
    weights.save(tmp_path / "ours.safetensors", network, "CC0")
    sha256 = hashlib.sha256((tmp_path / "ours.safetensors").read_bytes()).hexdigest().upper()
    assert opened(tmp_path, "ours.safetensors", network__sha256=sha256)[0] == 0
    assert opened(tmp_path, "ours.safetensors", network__sha256=sha256[::-1])[0] == 2


def test_the_command_says_it_and_writes_nothing(
    network: SuperResolver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lr(tmp_path / "lr.zarr", texture((4, 16, 16)))
    torch.save(nn.Sequential(network), tmp_path / "module.pth")
    path = volume_yaml(tmp_path / "volume.yaml", "lr.zarr", "sr", **KEYS, network__weights="module.pth")
    before = tree(tmp_path)
    assert run.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert "torch.save(network.state_dict(), 'weights.pth')" in said
    assert "Traceback" not in said
    assert tree(tmp_path) == before


def test_the_doctor_says_it_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No device is looked at with weights that cannot be had."""
    (tmp_path / "page.pth").write_bytes(PAGE)
    path = volume_yaml(tmp_path / "volume.yaml", "lr.zarr", "sr", **KEYS, network__weights="page.pth")
    assert doctor.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert "page.pth is a web page" in said
    assert "reference vector" not in said
