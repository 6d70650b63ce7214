"""Law 7 for `emsr train`: each mistake and each condition of the machine gives a line or two, exit code 2, no file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import texture, tree, write_lr
from safetensors.torch import load_file, save_file
from test_train import EARLIER, NO_PRIOR, stage_yaml

from models.config import Params, preset, with_codebook
from models.indexer import Indexer
from models.training import parts
from models.training.parts import Part
from models.vqgan import VQGAN
from pipeline import evaluate, run, train

VQGAN_KEYS: dict[str, Any] = {"losses__adversarial": 0.0}
HR = {"url": "hr.zarr"}


def volume(shape: tuple[int, int, int], change: Callable[[np.ndarray], np.ndarray] = lambda v: v) -> Any:
    def keys(folder: Path) -> dict[str, Any]:
        write_lr(folder / "other.zarr", change(texture(shape)))
        return {"data__train": [{"url": "other.zarr"}]}

    return keys


def given(**keys: Any) -> Any:
    return lambda folder: keys


def train_on(**keys: Any) -> Any:
    return given(data__train=[HR | keys])


def weights_for(key: str, write: Callable[[Path], object], **keys: Any) -> Any:
    def made(folder: Path) -> dict[str, Any]:
        write(folder / "w.safetensors")
        return {key: "w.safetensors", **keys}

    return made


def unrelated(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def flat_kernels(path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(3), "features.0.bias": torch.zeros(3)}, path)


def vqgan(path: Path, params: Params | None = None) -> None:
    params = params or preset(8, "small")
    parts.save_part(path, Part("vqgan", params, "CC0", VQGAN(params.prior).state_dict(), {}))


def file_at(name: str) -> Any:
    def made(folder: Path) -> dict[str, Any]:
        (folder / name.partition("/")[0]).write_text("")
        return {"output": name}

    return made


MISTAKES: list[tuple[str, str, Callable[[Path], dict[str, Any]], str]] = [
    ("99 GPUs", "flow", given(devices=99, accelerator="cuda"), "devices: 99, each of which takes a GPU"),
    ("TF32 on a CPU", "flow", given(precision="tf32", accelerator="cpu"), "precision tf32: a CPU does not"),
    ("rate 0", "flow", given(rate=0), "rate: saw 0, wanted greater than 0"),
    ("rate -1", "flow", given(rate=-1), "rate: saw -1, wanted greater than 0"),
    ("rate 1e9", "flow", given(rate=1e9), "rate: saw 1000000000.0, wanted less than or equal to 1"),
    ("rate yes", "flow", given(rate=True), "rate: saw True, wanted a number"),
    ("rate nan", "flow", given(rate=float("nan")), "rate: saw nan"),
    ("weight inf", "flow", given(losses__codebook=float("inf")), "losses.codebook: saw inf, wanted finite number"),
    ("batch 0", "flow", given(batch=0), "batch: saw 0"),
    ("batch in quotes", "flow", given(batch="8"), "batch: saw '8', wanted a whole number"),
    ("batch of terabytes", "flow", given(batch=10**9), "the samples of one step take 8,192 GB"),
    ("steps 0", "flow", given(steps=0), "steps: saw 0"),
    ("crop 40", "flow", given(data__crop=40), "data.crop as a multiple of 32 HR voxels (four LR voxels), not 40"),
    (
        "crop too small to be judged",
        "vqgan",
        given(losses__adversarial_from=0),
        "data.crop of at least 70 HR voxels, not 32, where losses.adversarial is not 0",
    ),
    ("drift", "flow", given(data__drift=1000), "sections of 72 x 72 voxels. Wanted: at least data.crop"),
    ("one section", "flow", volume((1, 72, 72)), "1 usable of 1 sections. Wanted: 2 consecutive ones"),
    ("all black", "flow", volume((8, 72, 72), lambda v: v * 0), "every section is constant"),
    ("small volume", "flow", volume((8, 20, 20)), "sections of 20 x 20 voxels"),
    ("NaN voxels", "flow", volume((8, 72, 72), lambda v: v * np.float32("nan")), "float32"),
    ("uint16", "flow", volume((8, 72, 72), lambda v: v.astype(np.uint16)), "intensity_window"),
    ("window upside down", "flow", train_on(intensity_window=[9, 3]), "low < high"),
    ("sections upside down", "flow", train_on(sections=[5, 2]), "0 <= first < last, not [5, 2]"),
    ("three sections", "flow", train_on(sections=[0, 1, 2]), "saw [0, 1, 2], wanted at most 2 items, not 3"),
    ("sections beyond", "flow", train_on(sections=[2, 9]), "sections within [0, 8]"),
    ("bad sections beyond", "flow", train_on(bad_sections=[3, 99]), "bad_sections [99]"),
    ("bad sections below", "flow", train_on(bad_sections=[-1]), "numbers from 0 to 7"),
    ("level that is not there", "flow", train_on(mip=3), "has 1 level, data.train.0.mip is 3"),
    ("volume not there", "flow", given(data__train=[{"url": "none.zarr"}]), "nothing is at data.train.0.url file"),
    ("a name for a volume", "flow", given(data__train=["hr.zarr"]), "saw 'hr.zarr', wanted a mapping of keys"),
    ("no list of volumes", "flow", given(data__train=HR), "data.train: wanted a list"),
    ("empty list", "flow", given(data__train=[]), "saw [], wanted at least 1 item, not 0"),
    ("output is a file", "flow", file_at("flow"), "flow is a file. Wanted: a folder"),
    ("output under a file", "flow", file_at("f/x"), "/f is a file. Wanted: a folder"),
    ("output is the volume", "flow", given(output="hr.zarr"), "lies in the volume"),
    ("output in the volume", "flow", given(output="hr.zarr/run"), "lies in the volume"),
    ("output where nothing can be", "flow", given(output="/proc/run"), "cannot be written"),
    ("output of nobody", "flow", given(output="~nosuchuser/run"), "a path written out, as this machine knows no home"),
    (
        "output of zero bytes",
        "flow",
        given(output="a\0b"),
        "wanted a path, of printable letters",
    ),
    ("output of no letters", "flow", given(output=""), "output: saw '', wanted a path"),
    ("output of 300 letters", "flow", given(output="x" * 300), "a path whose names have at most 255 bytes"),
    ("output on S3", "flow", given(output="s3://bucket/run"), "wanted a path on this machine, not a URL"),
    ("output of a variable", "flow", given(output="$SCRATCH/run"), "$NAME is not replaced, ~ is"),
    ("a stage at a URL", "indexer", given(network__vqgan="https://h/v.safetensors"), "network.vqgan: saw 'https://h"),
    ("a seed of 70 bits", "flow", given(seed=2**70), "seed: saw 1180591620717411303424, wanted less than"),
    ("a million threads", "flow", given(threads=10**6), "threads: saw 1000000, wanted less than or equal to 1024"),
    ("steps without end", "flow", given(steps=10**20), "steps: saw 100000000000000000000, wanted less than"),
    ("a volume of nobody", "flow", train_on(url="~nosuchuser/hr"), "data.train.0.url: url '~nosuchuser/hr'"),
    (
        "no LPIPS",
        "vqgan",
        given(losses__perceptual=1.0, losses__lpips_alex="none.pth", **VQGAN_KEYS),
        "none.pth cannot be read (No such file",
    ),
    (
        "LPIPS of nothing",
        "vqgan",
        weights_for("losses__lpips_alex", lambda p: p.write_bytes(b""), losses__perceptual=1.0, **VQGAN_KEYS),
        "is empty (0 bytes)",
    ),
    (
        "LPIPS of something else",
        "vqgan",
        weights_for("losses__lpips_alex", unrelated, losses__perceptual=1.0, **VQGAN_KEYS),
        "has no tensor features.0.weight (it has a)",
    ),
    (
        "LPIPS without kernels",
        "vqgan",
        weights_for("losses__lpips_alex", flat_kernels, losses__perceptual=1.0, **VQGAN_KEYS),
        "features.0 has a weight of (3,)",
    ),
    (
        "VGG of something else",
        "network",
        weights_for("losses__vgg", unrelated, losses__reference=1.0, **NO_PRIOR),
        "has no tensor features.0.weight",
    ),
    ("start of something else", "network", weights_for("network__start", unrelated, **NO_PRIOR), "no tensor that fits"),
    ("stages swapped", "indexer", weights_for("network__vqgan", lambda p: indexer(p)), "holds indexer; wanted vqgan"),
    (
        "a stage of another codebook",
        "indexer",
        weights_for("network__vqgan", lambda p: vqgan(p, with_codebook(preset(8, "small"), 256, 64))),
        "of scale 8, preset custom, does not fit this network",
    ),
    (
        "a stage of another preset",
        "indexer",
        weights_for("network__vqgan", lambda p: vqgan(p, preset(8, "paper"))),
        "of scale 8, preset paper, does not fit this network",
    ),
    ("a stage that is missing", "network", given(**EARLIER, network__mpf=True), "Train stage flow first"),
]


def indexer(path: Path) -> None:
    params = preset(8, "small")
    parts.save_part(path, Part("indexer", params, "CC0", Indexer(params.prior, 8).state_dict(), {}))


@pytest.mark.parametrize(("stage", "damage", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_named_before_the_first_step(
    stage: str,
    damage: Callable[[Path], dict[str, Any]],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_lr(tmp_path / "hr.zarr", texture((8, 72, 72)))
    keys = damage(tmp_path)
    output = keys.pop("output", stage)
    path = stage_yaml(tmp_path, stage, **keys)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"output": output}))
    before = tree(tmp_path)
    assert train.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2, said
    assert tree(tmp_path) == before


STAGE = b"stage: flow\noutput: flow\n"
TABLE = b"volumes: [{name: a, sr: s, gt: g}]\noutput: scores\n"
VOLUME = b"source: {url: lr.zarr}\ntarget: {url: sr}\nnetwork: {name: bicubic, scale: 8}\n"


@pytest.mark.parametrize(
    ("main", "text", "words"),
    [
        (train.main, VOLUME, "this is a volume.yaml by its source and target. Wanted a stage.yaml. Use emsr run"),
        (train.main, TABLE, "this is a table.yaml by its volumes. Wanted a stage.yaml. Use emsr evaluate"),
        (run.main, STAGE, "this is a stage.yaml by its stage. Wanted a volume.yaml. Use emsr train"),
        (run.main, TABLE, "Use emsr evaluate"),
        (evaluate.main, STAGE, "Wanted a table.yaml. Use emsr train"),
        (evaluate.main, VOLUME, "Wanted a table.yaml. Use emsr run"),
        (train.main, b"", "saw nothing, wanted the keys stage"),
        (train.main, b"- stage: flow\n", "saw list, wanted the keys stage"),
        (train.main, b"stage: flow\n\toutput: x\n", "2: not YAML: found character '\\t'"),
        (train.main, "stage: flow\n".encode("utf-16"), "not UTF-8 text: save it as UTF-8"),
        (train.main, "output: \xe4\n".encode("latin-1"), "not UTF-8 text: save it as UTF-8"),
    ],
)
def test_files_of_another_command_or_of_none(
    main: Callable[[list[str]], int], text: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "the.yaml").write_bytes(text)
    assert main([str(tmp_path / "the.yaml")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) == 1


def test_a_byte_order_mark_and_other_line_ends_are_read(tmp_path: Path) -> None:
    write_lr(tmp_path / "hr.zarr", texture((8, 72, 72)))
    path = stage_yaml(tmp_path, "flow", steps=1)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert train.main([str(path)]) == 0


def relinked(path: Path, to: str) -> None:
    path.unlink()
    path.symlink_to(to)


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def work(folder: Path) -> None:
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        torch.save(change(state) or state, folder / "checkpoint.pt")

    return work


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (spoilt(lambda state: [1, 2]), 0, "is damaged (it is no checkpoint)"),
        (spoilt(lambda state: state.pop("step") and None), 0, "is damaged (it is no checkpoint)"),
        (spoilt(lambda state: state.pop("settings") and None), 2, "of an earlier emsr, or of something else"),
        (spoilt(lambda state: state["network"].popitem() and None), 2, "is not of these networks"),
        (spoilt(lambda state: state.pop("adam") and None), 2, "is not of these networks"),
        (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe{"), 0, "going on from step 2"),
        (lambda folder: shutil.rmtree(folder / "tensorboard"), 0, "going on from step 2"),
        (lambda folder: (folder / "lock").unlink(), 0, "going on from step 2"),
        (lambda folder: (folder / "checkpoint.pt").write_text("<html>"), 0, "is damaged"),
        (lambda folder: relinked(folder / "checkpoint.pt", "gone.pt"), 0, "is damaged ([Errno 2]"),
        (lambda folder: relinked(folder / "checkpoint.pt", "checkpoint.pt"), 0, "is damaged ([Errno 40]"),
        (lambda folder: [path.unlink() for path in folder.glob("*.pt")], 2, "and no checkpoint to go on from"),
        (lambda folder: (folder / "metrics.jsonl").mkdir(), 2, "metrics.jsonl is not a file"),
        (lambda folder: (folder / "samples").touch(), 2, "samples is not a folder"),
    ],
)
def test_what_becomes_of_a_run_folder(
    damage: Callable[[Path], object], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lr(tmp_path / "hr.zarr", texture((8, 72, 72)))
    assert train.main([str(stage_yaml(tmp_path, "flow", steps=2, periods=[3]))]) == 0
    damage(tmp_path / "flow")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "flow").glob("checkpoint*") if path.exists()}
    capsys.readouterr()
    assert train.main([str(stage_yaml(tmp_path, "flow", steps=3, periods=[3]))]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    if code:
        assert kept == {path.name: path.read_bytes() for path in (tmp_path / "flow").glob("checkpoint*")}


def test_start_says_how_much_of_it_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lr(tmp_path / "hr.zarr", texture((8, 72, 72)))
    assert train.main([str(stage_yaml(tmp_path, "network", **NO_PRIOR, steps=1))]) == 0
    state = load_file(tmp_path / "network" / "last.safetensors")
    save_file({n: v for n, v in state.items() if n.startswith("features.input.")}, tmp_path / "some.safetensors")
    capsys.readouterr()
    keys = NO_PRIOR | {"output": "other", "steps": 1, "network__start": "some.safetensors"}
    assert train.main([str(stage_yaml(tmp_path, "network", **keys))]) == 0
    assert "emsr: network.start: 2 of " in capsys.readouterr().err
