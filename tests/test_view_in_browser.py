"""`python -m pipeline.view` in a real browser: source and target show the same tissue in the same place."""

# ruff: noqa: F811 - `volume` is a fixture of another file

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
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
import zarr
from cloudvolume import CloudVolume
from conftest import GUARD_S
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.registration import phase_cross_correlation
from test_view import (
    BOX,
    LR,
    LR_SHAPE,
    SCALE,
    SR,
    SR_VOXEL,
    VOXEL,
    Image8,
    give_up,
    viewing,
    volume,  # noqa: F401
    write_ome,
    write_precomputed,
    write_yaml,
)

from pipeline.base.geometry import ZYX, Box
from pipeline.plan.target_spec import LevelSpec, TargetSpec
from pipeline.storage.targets.open import open_target


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


def test_jpeg_xl_source_and_sharded_jpeg_xl_target(browser: Browser, tmp_path: Path) -> None:
    """cloud-volume writes the source; the target is emsr's own. Neuroglancer has a decoder of its own."""
    info = CloudVolume.create_new_info(
        1, "image", "uint8", "jxl", VOXEL[::-1], (0, 0, 0), LR_SHAPE[::-1], chunk_size=(64, 64, 2)
    )
    info["scales"][0]["jxl_quality"] = 100
    source = CloudVolume(f"file://{tmp_path}/lr", info=info, progress=False)
    source.commit_info()
    source[:, :, :] = LR.T[..., None]
    shape, chunk = ZYX.of(SR.shape), ZYX(2, 64, 64)
    level = LevelSpec(shape, chunk, ZYX(2, 128, 128))
    target = open_target(
        TargetSpec((tmp_path / "sr").as_uri(), "precomputed", "jxl", SCALE, SR_VOXEL, (0, 0, 0), (level,), None)
    )
    target.create()
    target.put(target.encode(0, Box(ZYX(0, 0, 0), shape), SR))
    volume = write_yaml(tmp_path, "url: precomputed://lr", "url: sr, format: precomputed")
    check_coincide(browser, volume, tmp_path, layers=2)
