"""The lattice: the same voxels whatever box they are computed in, interpolations against whole-volume references."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import standin
import torch
from conftest import texture
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional

import models
from models.baselines.interpolation import Bicubic
from models.layers import within
from pipeline.base.errors import NetworkError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import NetworkConfig
from pipeline.inference.describe import describe, weights_path
from pipeline.inference.network import Network
from pipeline.inference.tiles import SectionCaches, pad_laterally, super_resolve
from pipeline.plan.lattice import Lattice
from pipeline.plan.plan import Plan, Slab
from pipeline.worker import fidelity
from pipeline.worker.fidelity import back_projection_error
from pipeline.worker.pyramid import halve


def compute(
    network: Network, volume: np.ndarray, origin: ZYX, box: Box, caches: SectionCaches | None = None
) -> np.ndarray:
    """SR of `box` as one slab of a volume whose first voxel is `origin`."""
    lattice = network.spec.lattice
    bounds = Box.at(origin, ZYX.of(volume.shape))
    plan = Plan(bounds, bounds, box.shape, network.spec.scale, lattice, (), None)
    slab = Slab(0, box, lattice.with_halo(box).intersect(bounds), box)
    sections = [plan.section(z) for z in range(box.start.z - lattice.z_halo, box.stop.z + lattice.z_halo)]
    _, rows, cols = slab.read.slices(origin)
    return super_resolve(network, volume[[z - origin.z for z in sections]][:, rows, cols], sections, slab, caches)


def whole_bicubic(volume: np.ndarray, scale: int) -> np.ndarray:
    up = functional.interpolate(
        torch.from_numpy(volume).float()[:, None], scale_factor=scale, mode="bicubic", align_corners=False
    )
    return up[:, 0].round().clamp(0, 255).to(torch.uint8).numpy()


@pytest.mark.parametrize("scale", [8, 16])
def test_bicubic_equals_the_whole_volume_within_one_grey_level(scale: int) -> None:
    volume = texture((3, 70, 90))
    network = Network(describe(NetworkConfig(name="bicubic", scale=scale, cell=16)))
    origin = ZYX(5, -3, 11)
    sr = compute(network, volume, origin, Box.at(origin, ZYX.of(volume.shape)))
    assert np.abs(sr.astype(int) - whole_bicubic(volume, scale)).max() <= 1


def test_nearest_repeats_every_voxel() -> None:
    volume = texture((2, 20, 30))
    network = Network(describe(NetworkConfig(name="nearest", scale=8, cell=16)))
    sr = compute(network, volume, ZYX(0, 0, 0), Box.of((0, 0, 0), volume.shape))
    assert (sr == volume.repeat(8, 1).repeat(8, 2)).all()


def stand_in(lattice: Lattice) -> Network:
    network = Network(describe(NetworkConfig(name="nearest", scale=8)))
    network.module = standin.StandIn(8)
    object.__setattr__(network, "spec", network.spec.__class__("standin", 8, None, "", "float32", lattice))
    return network


@given(st.data())
@settings(max_examples=15)
def test_law_1_any_box_gives_the_same_bytes(data: st.DataObject) -> None:
    volume = texture((7, 37, 45))
    origin = ZYX(*(data.draw(st.integers(-30, 30)) for _ in range(3)))
    network = stand_in(Lattice(16, 8, 5, "mirror"))
    whole = compute(network, volume, origin, Box.at(origin, ZYX.of(volume.shape)))
    low = [data.draw(st.integers(0, n - 1)) for n in volume.shape]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, volume.shape, strict=True)]
    part = compute(network, volume, origin, Box.of(low, high).shift(origin))
    assert (part == whole[Box.of(low, high).lateral(8).slices()]).all()


def test_the_stand_in_would_show_a_cut() -> None:
    """The test above can fail: a network like this one gives other bytes on another lattice."""
    volume = texture((5, 32, 32))
    results = [
        compute(stand_in(Lattice(cell, 8, 5, "mirror")), volume, ZYX(0, 0, 0), Box.of((0, 0, 0), volume.shape))
        for cell in (16, 32)
    ]
    assert (results[0] != results[1]).mean() > 0.2


def test_padding_mirrors_about_the_face_or_repeats_the_end() -> None:
    row = np.arange(3, dtype=np.uint8)[None, None]
    have, want = Box.of((0, 0, 0), (1, 1, 3)), Box.of((0, 0, -4), (1, 1, 8))
    assert pad_laterally(row, have, want, "mirror")[0, 0].tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1]
    assert pad_laterally(row, have, want, "edge")[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 2]


def test_back_projection_error_by_hand() -> None:
    sr = np.array([[[10, 20, 0, 0], [30, 40, 0, 1]]], np.uint8)  # block means 25 and 0.25
    lr = np.array([[[20, 3]]], np.uint8)
    assert back_projection_error(lr, sr, 2).tolist() == [[[5, 3]]]
    assert (back_projection_error(lr, lr.repeat(2, 1).repeat(2, 2), 2) == 0).all()


@pytest.mark.parametrize("scale", [8, 16])
def test_back_projection_error_of_any_voxels(scale: int) -> None:
    """Whole numbers alone, against the definition; the largest sums too."""
    rng = np.random.default_rng(scale)
    lr = rng.integers(0, 256, (2, 3, 5), np.uint8)
    sr = rng.integers(0, 256, (2, 3 * scale, 5 * scale), np.uint8)
    sr[0, :scale, :scale], lr[0, 0, 0] = 255, 0
    area = scale * scale
    for z, y, x in np.ndindex(lr.shape):
        block = sr[z, y * scale : (y + 1) * scale, x * scale : (x + 1) * scale].astype(int)
        rounded = (2 * abs(int(block.sum()) - int(lr[z, y, x]) * area) + area) // (2 * area)
        assert back_projection_error(lr, sr, scale)[z, y, x] == rounded
    assert back_projection_error(lr, sr, scale)[0, 0, 0] == 255


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_back_projection_error_equals_whole_numbers(data: st.DataObject) -> None:
    """Whatever the voxels, all extremes among them, against sums of 64 bits."""
    scale = data.draw(st.sampled_from([2, 4, 8, 16]))
    depth, h, w = (data.draw(st.integers(1, most)) for most in (2, 5, 6))
    extremes = st.sampled_from([0, 1, 127, 128, 254, 255])
    lr = data.draw(arrays(np.uint8, (depth, h, w), elements=extremes | st.integers(0, 255)))
    sr = data.draw(arrays(np.uint8, (depth, h * scale, w * scale), elements=extremes, fill=extremes))
    area = scale * scale
    sums = sr.reshape(depth, h, scale, w, scale).sum(axis=(2, 4), dtype=np.int64)
    wanted = (2 * np.abs(sums - lr.astype(np.int64) * area) + area) // (2 * area)
    usual = fidelity._BLOCK_VOXELS
    for block in (1, usual):
        fidelity._BLOCK_VOXELS = block
        try:
            assert np.array_equal(back_projection_error(lr, sr, scale), wanted)
        finally:
            fidelity._BLOCK_VOXELS = usual


@pytest.mark.parametrize("scale", [8, 16])
@pytest.mark.parametrize(("n", "m", "cut"), [(24, 40, 8), (80, 80, 8), (144, 27, 8), (12, 61, 0), (192, 80, 8)])
def test_bicubic_in_blocks_is_the_product_with_the_whole_matrix(scale: int, n: int, m: int, cut: int) -> None:
    """Up to float32 rounding, which a CPU's BLAS decides; the bytes of both are the same."""
    network = Bicubic(scale)
    x = torch.from_numpy(texture((1, n, m))).float().div_(255)[None]
    whole = within(network._matrix(n, x) @ x @ network._matrix(m, x).T, cut * scale)
    blocks = network.fuse_window([x], cut)
    assert (blocks - whole).abs().max() < 1e-6
    assert torch.equal((blocks * 255).round(), (whole * 255).round())


def test_levels_of_a_slab_are_levels_of_the_volume() -> None:
    volume = texture((2, 64, 64))
    assert (halve(volume)[:, 16:32, 0:16] == halve(volume[:, 32:64, 0:32])).all()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"name": "edvr"}, "is not in this version"),
        ({"name": "gpemsr"}, "network.weights is not given"),
        (
            {"name": "gpemsr", "weights": "builtin:mouse"},
            r"there are builtin:drosophila-vnc \(x16\), .*, builtin:flyem-medulla \(x16\)",
        ),
        ({"name": "gpemsr", "weights": "builtin", "preset": "paper"}, "is for scale 8, preset small"),
        ({"name": "gpemsr", "weights": "builtin:../builtin/flyem-medulla"}, "there are"),
        ({"name": "gpemsr", "weights": "file:///nowhere/w.safetensors"}, "is not there"),
        ({"name": "gpemsr", "weights": "file:///nowhere/w.onnx"}, "no known ending"),
        ({"name": "gpemsr", "weights": "https://127.0.0.1/w.safetensors"}, r"without network\.sha256"),
        ({"name": "bicubic", "weights": "builtin"}, "Remove network.weights"),
        ({"name": "bicubic", "halo": 0}, "cell borders"),
        ({"name": "nearest", "precision": "float16"}, "Remove network.precision"),
    ],
)
def test_networks_that_cannot_be_had(keys: dict, words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        describe(NetworkConfig(scale=8, **keys))


def test_describing_a_network_does_not_import_torch() -> None:
    """Nor does planning or following a run: `status` and the client of a cluster start in a moment."""
    code = (
        "import sys; from pipeline import run, status; from pipeline.config.volume import NetworkConfig; "
        "from pipeline.inference.describe import describe; {}; "
        "describe(NetworkConfig(name='gpemsr', scale=8, weights='builtin')); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code.format("pass")], check=True)
    building = code.format("import models; models.build('nearest', 8)")
    refuted = subprocess.run([sys.executable, "-c", building], check=False, capture_output=True, text=True)
    assert refuted.stderr.endswith("AssertionError\n")


def test_every_network_builds() -> None:
    for name, traits in models.NETWORKS.items():
        network = models.build(name, 8, "small" if traits.weights else None).eval()
        with torch.inference_mode():
            states = [network.encode_section(torch.rand(1, 1, 16, 16)) for _ in range(traits.window)]
            assert network.fuse_window(states).shape == (1, 1, 128, 128)


def test_threads_do_not_change_the_bytes() -> None:
    """Workers of different sizes must agree (law 1)."""
    volume = texture((6, 64, 64))
    networks = [stand_in(Lattice(32, 8, 5, "mirror")), Network(describe(NetworkConfig(name="bicubic", scale=8)))]
    before = torch.get_num_threads()
    try:
        for network in networks:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(compute(network, volume, ZYX(0, 0, 0), Box.of((0, 0, 0), volume.shape)))
            assert (results[0] == results[1]).all()
            assert (results[0] == results[2]).all()
    finally:
        torch.set_num_threads(before)


def test_a_network_takes_no_short_cuts_in_rounding() -> None:
    """float32 means float32 on a GPU too, and an operator chosen by timings could differ on the next worker."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    Network(describe(NetworkConfig(name="nearest", scale=8)))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.deterministic


def test_carried_rings_change_no_byte_and_save_the_halo() -> None:
    """Slabs that follow each other in z: each section is encoded once per tile, not once per slab and tile."""
    volume = texture((9, 32, 32))
    network = stand_in(Lattice(16, 8, 5, "mirror"))
    calls: list[int] = []
    encode = network.module.encode_section
    network.module.encode_section = lambda section: calls.append(1) or encode(section)
    boxes = [Box.of((z, 0, 0), (z + 3, 32, 32)) for z in (0, 3, 6)]
    alone = [compute(network, volume, ZYX(0, 0, 0), box) for box in boxes]
    plain, caches = len(calls), {}
    calls.clear()
    carried = [compute(network, volume, ZYX(0, 0, 0), box, caches) for box in boxes]
    assert all((a == b).all() for a, b in zip(alone, carried, strict=True))
    assert (plain, len(calls)) == (4 * (5 + 7 + 5), 4 * 9)


def test_rings_hold_the_last_window_and_no_more() -> None:
    """A lease of a hundred slabs must not keep every section that it has seen."""
    volume = texture((9, 32, 32))
    network = stand_in(Lattice(16, 8, 5, "mirror"))
    caches: SectionCaches = {}
    for z in (0, 3, 6):
        compute(network, volume, ZYX(0, 0, 0), Box.of((z, 0, 0), (z + 3, 32, 32)), caches)
        last = [min(n, 8) for n in range(z, z + 5)]
        assert [sorted(ring) for ring in caches.values()] == [sorted(set(last))] * 4


def test_the_smallest_halo_is_allowed_and_none_below() -> None:
    least = models.NETWORKS["bicubic"].min_halo
    assert describe(NetworkConfig(name="bicubic", scale=8, halo=least)).lattice.halo == least
    with pytest.raises(NetworkError, match="would show the cell borders"):
        describe(NetworkConfig(name="bicubic", scale=8, halo=least - 8))


def test_a_worker_with_other_builtin_weights_is_refused() -> None:
    """They lie wherever emsr is installed, so another commit there may have others under the same name."""
    spec = describe(NetworkConfig(name="gpemsr", scale=8, weights="builtin"))
    assert weights_path(spec).suffix == ".safetensors"
    with pytest.raises(NetworkError, match="Install the same emsr in every process"):
        weights_path(replace(spec, weights_sha256="0" * 64))
