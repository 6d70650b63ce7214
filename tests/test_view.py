"""`python -m pipeline.view`: in a real browser, source and target show the same tissue in the same place."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import tensorstore as ts
import zarr
from conftest import GUARD_S
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.registration import phase_cross_correlation

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
        (lambda p: shutil.rmtree(p / "sr"), "pipeline.run"),
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


# --- the browser ------------------------------------------------------------------------------------------------------


@dataclass
class Browser:
    """Headless Chromium, driven through chromedriver's HTTP interface (W3C WebDriver)."""

    session: str

    def call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self.session + path, method=method, data=None if body is None else json.dumps(body).encode()
        )
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=GUARD_S) as response:
            return json.load(response)["value"]

    def js(self, script: str, *args: Any) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def open(self, link: str, layers: int) -> None:
        self.call("POST", "/url", {"url": link})
        self.wait(
            f"window.viewer && viewer.layerManager.managedLayers.length == {layers}"
            " && viewer.layerManager.managedLayers.every(l => l.isReady())"
        )

    def wait(self, condition: str) -> None:
        """Until the JavaScript `condition` holds."""
        end = time.monotonic() + GUARD_S
        while not self.js(f"return !!({condition})"):
            assert time.monotonic() < end, f"never: {condition}; {self.js('return document.body.innerText')}"
            time.sleep(0.1)

    def picture(self) -> Image8:
        """Luminance of the window once all chunks in view are drawn: two pictures alike with nothing left to load."""
        end, last = time.monotonic() + GUARD_S, None
        while time.monotonic() < end:
            self.wait("viewer.isReady()")
            image = np.asarray(Image.open(io.BytesIO(base64.b64decode(self.call("GET", "/screenshot")))).convert("L"))
            if last is not None and np.array_equal(image, last) and self.js("return viewer.isReady()"):
                return image
            last = image
        raise AssertionError("the picture did not come to rest")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        "--ignore-gpu-blocklist",
        "--disable-background-networking",
        "--no-first-run",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1000,800",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ]
    process = subprocess.Popen(
        [driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout
    try:
        port = next(
            m.group(1) for m in (re.search(r"started successfully on port (\d+)", line) for line in process.stdout) if m
        )
        root = Browser(f"http://127.0.0.1:{port}")
        options = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"binary": chromium, "args": flags}}}}
        session = Browser(f"{root.session}/session/{root.call('POST', '/session', options)['sessionId']}")
        try:
            yield session
        finally:
            session.call("DELETE", "")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def show_only(browser: Browser, name: str, first_voxel: tuple[float, float, float], shape: tuple[int, int]) -> Image8:
    """The picture of `shape` SR voxels from `first_voxel` (z, y, x; global SR voxels) at one pixel per voxel.

    `name` is the only layer, and there are no overlays.
    """
    browser.js(
        "for (const layer of viewer.layerManager.managedLayers) layer.setVisible(layer.name === arguments[0]);"
        "for (const key of ['showAxisLines', 'showScaleBar', 'showDefaultAnnotations'])"
        "  viewer.state.children.get(key).value = false;"
        "viewer.selectedLayer.visible = false;"
        "viewer.state.children.get('crossSectionScale').restoreState(1);",
        name,
    )
    browser.wait("document.querySelector('.neuroglancer-rendered-data-panel').clientWidth > window.innerWidth - 20")
    x, y, width, height = browser.js(
        "const e = document.querySelector('.neuroglancer-rendered-data-panel'), r = e.getBoundingClientRect();"
        "return [r.x + e.clientLeft, r.y + e.clientTop, e.clientWidth, e.clientHeight]"
    )
    left, top = int(x + (width - shape[1]) // 2), int(y + (height - shape[0]) // 2)
    # The panel's middle shows `position`: pixel (top, left) is the first voxel, and pixel centres are voxel centres.
    centre = [first_voxel[2] + x + width / 2 - left, first_voxel[1] + y + height / 2 - top, first_voxel[0]]
    browser.js("viewer.navigationState.position.value = Float32Array.of(...arguments)", *centre)
    return browser.picture()[top : top + shape[0], left : left + shape[1]]


def shift(a: NDArray[Any], b: NDArray[Any]) -> float:
    """By how many pixels two pictures of the same tissue are displaced, both blurred to LR's resolution."""
    moved, _, _ = phase_cross_correlation(
        *(ndimage.gaussian_filter(p.astype(float), 4) for p in (a, b)), upsample_factor=20
    )
    return float(np.abs(moved).max())


def alike(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(*(ndimage.gaussian_filter(p.astype(float), 4).ravel() for p in (a, b)))[0, 1])


WHOLE = ((0, 0, 0), LR_SHAPE)
LOW, HIGH = -0.4, 0.4
"""Positions in z within a section, near its faces: half a section of misplacement would show another one at one."""


def check_coincide(
    browser: Browser,
    volume: Path,
    keep: Path,
    layers: int,
    box: tuple[tuple[int, ...], ...] = WHOLE,
    heights: tuple[float, ...] = (LOW,),
) -> None:
    """All layers load; shown alone, each is the middle section of `box`.

    They lie on one another to better than half an SR voxel.
    """
    start, stop = np.array(box)
    middle = int(start[0] + (stop[0] - start[0]) // 2)
    rows, columns = slice(*(int(v[1]) for v in (start, stop))), slice(*(int(v[2]) for v in (start, stop)))
    lr, sr = (
        LR[middle, rows, columns],
        SR[middle, rows.start * SCALE : rows.stop * SCALE, columns.start * SCALE : columns.stop * SCALE],
    )
    with viewing(volume) as link:
        browser.open(link, layers)
        both = browser.picture()
        Image.fromarray(both).save(keep / "both.png")
        x, y, z = browser.js("return Array.from(viewer.navigationState.position.value)")
        zoom = browser.js("return viewer.state.toJSON().crossSectionScale")
        width, height = browser.js(
            "const e = document.querySelector('.neuroglancer-rendered-data-panel');"
            "return [e.clientWidth, e.clientHeight]"
        )
        assert max(sr.shape[0] / height, sr.shape[1] / width) <= zoom, "the whole target is in view"
        # The state alone centres the target: half its extent below the position lies its first voxel.
        first = (y - sr.shape[0] / 2, x - sr.shape[1] / 2)
        seen = {
            (name, off): show_only(browser, name, (z + off, *first), (sr.shape[0], sr.shape[1]))
            for name in ("LR", "SR")
            for off in heights
        }
    expected = {"LR": lr.repeat(SCALE, 0).repeat(SCALE, 1), "SR": sr}
    for (name, off), picture in seen.items():
        Image.fromarray(picture).save(keep / f"{name}{off:+}.png")
        assert picture.std() > 20, f"{name} is blank"
        assert alike(picture, expected[name]) > 0.8
        assert shift(picture, expected[name]) < 0.5
        assert (np.abs(picture.astype(int) - expected[name]) <= 2).mean() > 0.99, (
            f"{name} is not that section voxel for voxel"
        )
    assert alike(seen["LR", LOW], seen["SR", LOW]) > 0.8
    assert shift(seen["LR", LOW], seen["SR", LOW]) < 0.5
    unlike = SR[middle - 1, : sr.shape[0], : sr.shape[1]]
    assert alike(seen["SR", LOW], unlike) < 0.5, "the measure must tell sections apart"


def test_the_browser_shows_what_is_quarantined(browser: Browser, tmp_path: Path) -> None:
    write_ome(tmp_path / "lr.zarr", LR, VOXEL, (0.0, 0.0, 0.0))
    write_yaml(tmp_path)
    give_up(tmp_path / "volume.yaml", [0])
    with viewing(tmp_path / "volume.yaml") as link:
        browser.open(link, 4)
        (box,) = browser.js("return viewer.layerManager.getLayerByName('quarantined').layer.toJSON().annotations")
    assert (box["id"], box["pointA"], box["pointB"]) == ("task 0", [0, 0, 0], [640, 512, 6])
    assert box["description"].endswith("its chunk 0 is missing")


def test_ome_source_and_sharded_ome_target(browser: Browser, volume: Path, tmp_path: Path) -> None:
    check_coincide(browser, volume, tmp_path, layers=3)


def test_box_of_an_ome_source_and_a_sharded_precomputed_target(browser: Browser, tmp_path: Path) -> None:
    """The source begins half a section below 0, where precomputed cannot begin: the state moves the target by that."""
    (z0, y0, x0), (z1, y1, x1) = BOX
    write_ome(tmp_path / "lr.zarr", LR, VOXEL, (-22.5, -18.5, -18.5))
    part = SR[z0:z1, y0 * SCALE : y1 * SCALE, x0 * SCALE : x1 * SCALE]
    write_precomputed(tmp_path / "sr", part, SR_VOXEL, (z0, y0 * SCALE - 4, x0 * SCALE - 4), sharded=True)
    volume = write_yaml(
        tmp_path, f"url: lr.zarr, box: {{start: {list(BOX[0])}, stop: {list(BOX[1])}}}", "url: sr, format: precomputed"
    )
    check_coincide(browser, volume, tmp_path, layers=2, box=BOX, heights=(LOW, HIGH))


def test_bare_zarr_2_without_voxel_size(browser: Browser, tmp_path: Path) -> None:
    """An array inside a group, with no metadata but volume.yaml's: placed by the state."""
    group = zarr.open_group(tmp_path / "lr.zarr", mode="w", zarr_format=2)
    group.create_array("em/raw", shape=LR.shape, dtype="u1", chunks=(2, 64, 64))[:] = LR
    write_ome(tmp_path / "sr", SR, SR_VOXEL, (0.0, 0.0, 0.0), shard=(6, 256, 384))
    volume = write_yaml(tmp_path, f"url: lr.zarr, array: em/raw, voxel_size_nm: {list(VOXEL)}")
    check_coincide(browser, volume, tmp_path, layers=2)


def test_n5_without_voxel_size(browser: Browser, tmp_path: Path) -> None:
    metadata = {
        "dimensions": list(LR.shape[::-1]),
        "blockSize": [64, 64, 2],
        "dataType": "uint8",
        "compression": {"type": "gzip"},
    }
    ts.open(
        {"driver": "n5", "kvstore": {"driver": "file", "path": f"{tmp_path}/lr.n5/"}, "metadata": metadata}, create=True
    ).result().T.write(LR).result()
    write_ome(tmp_path / "sr", SR, SR_VOXEL, (0.0, 0.0, 0.0), shard=(6, 256, 384))
    volume = write_yaml(tmp_path, f"url: lr.n5, voxel_size_nm: {list(VOXEL)}")
    check_coincide(browser, volume, tmp_path, layers=2)


def test_precomputed_source_with_packed_chunk_files(browser: Browser, tmp_path: Path) -> None:
    """cloud-volume's way of storing local chunks (`.gz`), an offset, and an unsharded precomputed target."""
    offset = (20, -16, 30)
    write_precomputed(tmp_path / "lr", LR, VOXEL, offset, sharded=False)
    for chunk in (tmp_path / "lr").glob("*_*_*/*"):
        chunk.with_name(f"{chunk.name}.gz").write_bytes(gzip.compress(chunk.read_bytes()))
        chunk.unlink()
    write_precomputed(tmp_path / "sr", SR, SR_VOXEL, (20, -16 * SCALE, 30 * SCALE), sharded=False)
    volume = write_yaml(tmp_path, "url: precomputed://lr", "url: sr, format: precomputed")
    check_coincide(browser, volume, tmp_path, layers=2)
