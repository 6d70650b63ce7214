"""`python -m pipeline.view`: the state it links to, what it says, and how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tensorstore as ts
import zarr
from conftest import GUARD_S
from numpy.typing import NDArray
from scipy import ndimage

from pipeline import status
from pipeline.config import volume as config
from pipeline.config.urls import sidecar
from pipeline.plan.receipt import QUARANTINED, Receipt
from pipeline.prepare.place import claim
from pipeline.prepare.prepare import prepare
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.view import main
from pipeline.viewer.file_server import serving
from pipeline.viewer.layers import browser_url

ROOT = Path(__file__).resolve().parents[1]
SCALE, VOXEL = 8, (45.0, 37.0, 37.0)
SR_VOXEL = (45.0, 37 / 8, 37 / 8)
LR_SHAPE = (6, 64, 80)
BOX = ((1, 8, 16), (5, 56, 72))
Image8 = NDArray[np.uint8]


def tissue() -> tuple[Image8, Image8]:
    """LR and SR of six unlike sections: blobs of about 14 SR voxels with sharp dark edges. LR is SR's 8x8 mean."""
    z, y, x = LR_SHAPE
    field = ndimage.gaussian_filter(np.random.default_rng(7).normal(size=(z, y * SCALE, x * SCALE)), (0, 14, 14))
    field /= field.std()
    sr = np.clip(128 + 70 * np.tanh(2 * field), 0, 255)
    sr[np.abs(field) < 0.15] = 30
    lr = sr.reshape(z, y, SCALE, x, SCALE).mean((2, 4))
    return lr.round().astype(np.uint8), sr.round().astype(np.uint8)


LR, SR = tissue()


def write_ome(
    path: Path,
    voxels: Image8,
    voxel_nm: tuple[float, ...],
    corner_nm: tuple[float, ...],
    shard: tuple[int, ...] | None = None,
) -> None:
    """OME-Zarr 0.5 by zarr-python; the translation is the first voxel's centre."""
    steps = [
        {"type": "scale", "scale": list(voxel_nm)},
        {"type": "translation", "translation": [c + v / 2 for c, v in zip(corner_nm, voxel_nm, strict=True)]},
    ]
    axes = [{"name": n, "type": "space", "unit": "nanometer"} for n in "zyx"]
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"name": "v", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}],
    }
    blosc = zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=1)
    group.create_array(
        "0",
        shape=voxels.shape,
        dtype="u1",
        chunks=(2, 64, 128),
        shards=shard,
        compressors=blosc,
        dimension_names=list("zyx"),
    )[:] = voxels


def write_precomputed(
    path: Path, voxels: Image8, voxel_nm: tuple[float, ...], offset: tuple[int, ...], sharded: bool
) -> None:
    """Precomputed by tensorstore, x first."""
    scale: dict[str, Any] = {
        "resolution": list(voxel_nm[::-1]),
        "voxel_offset": list(offset[::-1]),
        "size": list(voxels.shape[::-1]),
    }
    scale |= {"chunk_size": [64, 64, 2], "encoding": "raw"}
    if sharded:
        scale["sharding"] = {
            "@type": "neuroglancer_uint64_sharded_v1",
            "hash": "identity",
            "preshift_bits": 3,
            "minishard_bits": 2,
            "shard_bits": 3,
            "minishard_index_encoding": "gzip",
            "data_encoding": "gzip",
        }
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 1},
        "scale_metadata": scale,
    }
    ts.open(spec, create=True).result()[..., 0].T[ts.d[:].translate_to[0]].write(voxels).result()


def write_yaml(folder: Path, source: str = "url: lr.zarr", target: str = "url: sr") -> Path:
    path = folder / "volume.yaml"
    path.write_text(f"source: {{{source}}}\ntarget: {{{target}}}\nnetwork: {{name: bicubic, scale: {SCALE}}}\n")
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """OME-Zarr source and target with a position, and a fidelity volume."""
    corner = (900.0, -370.0, 51.5)
    write_ome(tmp_path / "lr.zarr", LR, VOXEL, corner)
    write_ome(tmp_path / "sr", SR, SR_VOXEL, corner, shard=(6, 256, 384))
    write_ome(tmp_path / "sr" / "fidelity", LR, VOXEL, corner)
    return write_yaml(tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_state_alone(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(volume), "--state"]) == 0
    out, err = capsys.readouterr()
    state = json.loads(out)
    assert [layer["name"] for layer in state["layers"]] == ["LR", "SR", "fidelity"]
    assert [layer["source"]["url"] for layer in state["layers"]] == [
        f"zarr3://file://{volume.parent}/{name}" for name in ("lr.zarr", "sr", "sr/fidelity")
    ]
    assert not any("transform" in layer["source"] for layer in state["layers"]), (
        "OME metadata alone must make them coincide"
    )
    assert "web server" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("translated", [True, False])
def test_a_coarser_level_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str], translated: bool) -> None:
    """The layer shows the whole pyramid; what must lie under the target is the level that was read.

    Metadata says where, and is believed.
    """
    write_ome(tmp_path / "lr.zarr", LR, VOXEL, (0.0, 0.0, 0.0))
    group = zarr.open_group(tmp_path / "lr.zarr")
    ome = group.attrs["ome"]
    steps = [
        {"type": "scale", "scale": [45.0, 74.0, 74.0]},
        {"type": "translation", "translation": [22.5, 37.0, 37.0] if translated else [22.5, 0.0, 0.0]},
    ]
    ome["multiscales"][0]["datasets"].append({"path": "1", "coordinateTransformations": steps})
    group.attrs["ome"] = ome
    group.create_array("1", shape=(6, 32, 40), dtype="u1", chunks=(2, 32, 32), dimension_names=list("zyx"))[:] = LR[
        :, ::2, ::2
    ]
    corner = (0.0, 0.0, 0.0) if translated else (0.0, -37.0, -37.0)
    write_ome(tmp_path / "sr", np.zeros((6, 256, 320), np.uint8), (45.0, 74 / 8, 74 / 8), corner)
    assert main([str(write_yaml(tmp_path, "url: lr.zarr, mip: 1")), "--state"]) == 0
    assert not any("transform" in layer["source"] for layer in json.loads(capsys.readouterr().out)["layers"])


def give_up(volume: Path, tasks: list[int]) -> None:
    """A claimed target whose ledger holds these tasks as quarantined."""
    prepared = prepare(config.load(volume))
    store = Store(sidecar(prepared.job.target.url))
    claim(prepared)
    ledger = Ledger(store, prepared.job.digest, prepared.job.plan.tasks, "r")
    ledger.record(
        Receipt(i, QUARANTINED, error=f"its chunk {i} is missing\n\nTraceback", worker="host:1") for i in tasks
    )
    ledger.flush()


def test_quarantined_slabs_are_marked_where_they_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slabs of 2 x 32 x 32 LR voxels, z fastest: number 1 is the next one in z, the last one is cut by the end."""
    write_ome(tmp_path / "lr.zarr", LR, VOXEL, (900.0, -370.0, 51.5))
    shapes = (
        "target: {url: sr, chunk_shape: [2, 64, 64], shard_shape: [2, 256, 256]}\nwork: {slab_shape: [2, 32, 32]}\n"
    )
    (tmp_path / "volume.yaml").write_text(
        f"source: {{url: lr.zarr}}\nnetwork: {{name: bicubic, scale: {SCALE}}}\n{shapes}"
    )
    give_up(tmp_path / "volume.yaml", [1, 17])
    assert main([str(tmp_path / "volume.yaml"), "--state"]) == 0
    layer = json.loads(capsys.readouterr().out)["layers"][-1]
    assert (layer["name"], layer["type"]) == ("quarantined", "annotation")
    assert [box["id"] for box in layer["annotations"]] == ["task 1", "task 17"]
    assert "LR box" in layer["annotations"][0]["description"]
    assert layer["annotations"][0]["description"].endswith("its chunk 1 is missing")
    first = np.array([51.5 / SR_VOXEL[2], -370 / SR_VOXEL[1], 900 / SR_VOXEL[0]])
    for box, low, high in zip(
        layer["annotations"], ([0, 0, 2], [512, 256, 4]), ([256, 256, 4], [640, 512, 6]), strict=True
    ):
        np.testing.assert_allclose(box["pointA"], first + low, atol=1e-6)
        np.testing.assert_allclose(box["pointB"], first + high, atol=1e-6)
    assert status.main([str(tmp_path / "volume.yaml")]) == 1
    out = capsys.readouterr().out
    assert "quarantined  task 17, LR box" in out
    assert "its chunk 17 is missing [host:1]" in out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "volume.yaml").unlink(), "volume.yaml: cannot be read"),
        (
            lambda p: (p / "volume.yaml").write_text(
                "source: {url: lr.zarr}\ntarget: {}\nnetwork: {name: bicubic, scale: 8}\n"
            ),
            "target.url",
        ),
        (lambda p: shutil.rmtree(p / "sr"), "emsr run"),
        (lambda p: shutil.rmtree(p / "lr.zarr"), "lr.zarr"),
        (lambda p: (p / "sr" / "zarr.json").write_text("{"), "cannot be understood"),
        (lambda p: (p / "sr" / "zarr.json").write_text("[]"), "cannot be understood"),
        (lambda p: (p / "sr" / "0" / "zarr.json").unlink(), "cannot be understood"),
        (lambda p: write_yaml(p, source="url: lr.zarr, box: {start: [0, 0, 0], stop: [6, 64, 72]}"), "(6, 512, 576)"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    volume: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], words: str
) -> None:
    damage(volume.parent)
    for flags in ([], ["--state"]):
        assert main([str(volume), *flags]) == 2
        out, err = capsys.readouterr()
        assert words in err
        assert "Traceback" not in err
        assert out == ""


def test_flags_are_few(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert set(re.findall(r"--\w+", capsys.readouterr().out)) == {"--help", "--state", "--port"}
    for port in ("0", "65535", "x", "-1"):
        with pytest.raises(SystemExit) as end:
            main([str(volume), "--port", port])
        assert end.value.code == 2


def two_free_ports() -> int:
    """A port that is free together with the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            second.bind(("127.0.0.1", port + 1))
            return port


def test_a_port_in_use(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The viewer takes the given port, and the next one for the volumes."""
    port = two_free_ports()
    for taken in (port, port + 1):
        with socket.create_server(("127.0.0.1", taken)):
            assert main([str(volume), "--port", str(port)]) == 2
            assert re.search(rf"port {taken} .*--port", capsys.readouterr().err)


def test_without_the_viewer_package(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "neuroglancer", None)
    assert main([str(volume)]) == 2
    assert "pip install 'emsr[view]'" in capsys.readouterr().err
    assert main([str(volume), "--state"]) == 0


def test_remote_volumes_have_a_link_for_any_neuroglancer(
    volume: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "neuroglancer", None)
    with serving({"v": volume.parent}) as bases:
        write_yaml(volume.parent, f"url: '{bases['v']}/lr.zarr'", f"url: '{bases['v']}/sr'")
        assert main([str(volume)]) == 0
    out = capsys.readouterr().out
    state = json.loads(unquote(out.strip().partition("#!")[2]))
    assert [layer["source"]["url"] for layer in state["layers"]] == [
        f"zarr3://{bases['v']}/{name}" for name in ("lr.zarr", "sr", "sr/fidelity")
    ]


def test_s3_through_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 and tensorstore take from the environment, a browser must be told in the URL."""
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert browser_url("zarr3://s3://bucket/a/b") == "s3://bucket/a/b"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example:9000")
    assert browser_url("s3://bucket/a/b") == "s3+https://minio.example:9000/bucket/a/b"
    assert browser_url("gs://bucket/a") == "gs://bucket/a"


@contextlib.contextmanager
def viewing(volume: Path) -> Iterator[str]:
    """The command as a user starts it; ends it as a user does, by Ctrl-C, and holds that it ends well."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.view", str(volume)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout
    assert process.stderr
    try:
        line = process.stdout.readline()
        assert line.startswith("Neuroglancer: http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[1]
        process.send_signal(signal.SIGINT)
        assert process.wait(GUARD_S) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_ctrl_c_ends_it_and_its_servers(volume: Path) -> None:
    with viewing(volume) as link:
        assert urllib.request.urlopen(link, timeout=GUARD_S).status == 200
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(link, timeout=GUARD_S)
