"""Memory of the five-section network: what the plan predicts, what a process takes, what a user reads without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import texture, tree, volume_yaml, write_lr

import models
from models import memory, weights
from models.config import preset
from models.network import SuperResolver
from pipeline import run
from pipeline.base.errors import DataError, TooLargeError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import NetworkConfig
from pipeline.inference.describe import describe
from pipeline.inference.footprint import footprint
from pipeline.inference.network import Network
from pipeline.plan.lattice import Lattice
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.plan.price import Footprint, memory_bytes
from pipeline.plan.target_spec import LevelSpec
from pipeline.process import device

_PEAK = """
import sys
import numpy as np
from pipeline.process import allocator
from pipeline.inference.network import Network
from pipeline.inference.footprint import footprint
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.lattice import Lattice
name, scale, tile = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
allocator.configure_malloc()
network = Network(NetworkSpec("gpemsr", scale, name, "", "float32", Lattice(tile - 16, 8, 5, "mirror")))
sections = np.random.default_rng(0).integers(0, 256, (6, 1, tile, tile), dtype=np.uint8)
status = lambda key: next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
with network.tiles(sections, [0, 0, 0, 0, 1, 1], {}).finish():
    pass
held = network.resident
print((status("VmHWM") - before) / (held.tile_bytes + 2 * held.cache_bytes / 5))
"""
"""Two different sections: one is encoded before the first window is fused, one after it, beside what fusing left."""

FAST = [("small", 8, 80), ("small", 16, 48), ("paper", 8, 48)]
SLOW = [("paper", 8, 80), ("paper", 16, 48), ("paper", 16, 64), ("small", 16, 80)]


@pytest.mark.parametrize(
    ("name", "scale", "tile"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_process_grows_by_what_is_predicted(name: str, scale: int, tile: int) -> None:
    """Within 15 %, weights random and already there, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, name, str(scale), str(tile)], capture_output=True, text=True, check=True
    )
    assert 0.85 <= float(done.stdout) <= 1.15


@pytest.mark.parametrize("scale", [8, 16])
def test_a_state_is_as_large_as_predicted(scale: int) -> None:
    params = preset(scale, "small")
    with torch.inference_mode():
        state = SuperResolver(params).encode_section(torch.rand(1, 1, 16, 16))
    assert sum(part.nbytes for part in (state.section, *state.pyramid)) == memory.state_bytes(params, 16)


def a_plan(lattice: Lattice) -> Plan:
    box = Box.of((0, 0, 0), (4, 64, 64))
    level = LevelSpec(ZYX(4, 512, 512), ZYX(4, 256, 256), ZYX(4, 512, 512))
    return Plan(box, box, ZYX(4, 64, 64), 8, lattice, (level,), None)


def test_the_promise_counts_one_tile_and_the_caches_of_every_slab_in_flight() -> None:
    plan = a_plan(Lattice(32, 8, 5, "mirror"))  # four tiles a slab
    held = Footprint(tile_bytes=10**9, cache_bytes=10**6)
    assert held.slab_cache_bytes(plan) == 4 * 10**6
    for in_flight in (2, 3, 5):
        more = memory_bytes(plan, in_flight, 0, 1.0, held) - memory_bytes(plan, in_flight, 0, 1.0, Footprint())
        assert more == pytest.approx(10**9 + in_flight * 4 * 10**6, abs=plan.levels[0].shape.product * 4)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_the_promise_counts_what_grey_levels_pass_through(in_flight: int) -> None:
    """All the time, since it is kept: once on a CPU; on a GPU for every slab and one more batch, of powers of two."""
    plan = a_plan(Lattice(32, 8, 5, "mirror"))  # slabs of four sections
    nothing = memory_bytes(plan, in_flight, 0, 1.0, Footprint())
    on_cpu, on_gpu = Footprint(landing_bytes=3 << 20), Footprint(10**9, 10**6, 4, 3 << 20, pinned=True).of_host
    assert memory_bytes(plan, in_flight, 0, 1.0, on_cpu) - nothing == 12 << 20
    assert memory_bytes(plan, in_flight, 0, 1.0, on_gpu) - nothing == (in_flight + 1) * 16 << 20


def test_lower_precision_needs_less() -> None:
    """Sections half; while it computes, half on a GPU but for what samples the taps, three quarters on a CPU."""

    def held(precision: str, gpu: bool) -> Footprint:
        return footprint(NetworkSpec("gpemsr", 8, "paper", "", precision, Lattice(64, 8, 5, "mirror")), gpu)

    for gpu, least, most in ((False, 0.74, 0.76), (True, 0.5, 0.85)):
        whole, narrow = held("float32", gpu), held("bfloat16", gpu)
        assert held("tf32", gpu) == whole
        assert narrow.cache_bytes == pytest.approx(whole.cache_bytes / 2, rel=0.02)
        share = (narrow.tile_bytes - memory.WARM_BYTES) / (whole.tile_bytes - memory.WARM_BYTES)
        assert least <= share <= most


KEYS = {"network__name": "gpemsr", "network__preset": "small", "target__mips": 1}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    network = models.build("gpemsr", 8, "small")
    assert isinstance(network, SuperResolver)
    weights.save(tmp_path / "small.safetensors", network, licence="CC0-1.0 (random)")
    write_lr(tmp_path / "lr.zarr", texture((4, 32, 32)))
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_cell_that_no_device_could_hold_is_refused_before_anything_is_written(
    small: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = volume_yaml(
        small / "v.yaml", "lr.zarr", "sr", **KEYS, network__weights="small.safetensors", network__cell=4096
    )
    before = tree(small)
    assert run.main([str(path), *flags]) == 2
    said = capsys.readouterr().err
    assert "a tile of 4128 x 4128 LR voxels" in said
    assert "Wanted: network.cell" in said
    assert "Traceback" not in said
    assert tree(small) == before


_SHORT = """
import resource, sys
from pipeline.config import volume as config
from pipeline.process import device
from pipeline.worker.lease import process_lease
from pipeline.worker.open_job import open_job
from pipeline.prepare.prepare import prepare
from pipeline.plan.receipt import WRITTEN
job = prepare(config.load(sys.argv[1])).job
assert process_lease(job, 0, 1).receipts[0].state == WRITTEN
opened = open_job(job)
vms = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:"))
for more in range(400, 100, -50):
    resource.setrlimit(resource.RLIMIT_AS, (vms + (more << 20), -1))
    if error := process_lease(job, 1, 2).receipts[0].error:
        print(error)
        break
"""


def test_a_tile_without_memory_is_quarantined_at_once_and_says_what_would_fit(small: Path) -> None:
    """A real limit, lowered on a process that has done a slab until another one finds no room.

    How much it takes differs by machine.
    """
    keys = KEYS | {"network__weights": "small.safetensors", "network__cell": 128, "work__slab_shape": [2, 32, 32]}
    path = volume_yaml(small / "v.yaml", "lr.zarr", "sr", **keys)
    done = subprocess.run([sys.executable, "-c", _SHORT, str(path)], capture_output=True, text=True, check=True)
    first = done.stdout.splitlines()[0]
    assert first.startswith("TooLargeError: network.cell 128 with halo 16: a tile of 160 x 160 LR voxels")
    assert "GB are there. Wanted: network.cell " in first
    cell = int(first.partition("Wanted: network.cell ")[2].split()[0])
    assert cell % 8 == 0
    assert 8 <= cell < 128


def test_other_faults_are_not_taken_for_it() -> None:
    assert device.out_of_memory(MemoryError())
    assert device.out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
    )
    assert not device.out_of_memory(RuntimeError("sizes differ"))
    assert not device.out_of_memory(ValueError("DefaultCPUAllocator: "))
    assert TooLargeError("a").exit_code == 2


def test_sections_and_grey_levels_pass_as_they_are() -> None:
    sections = texture((6, 8, 8)).reshape(3, 2, 8, 8)
    assert np.array_equal(device.send(torch.device("cpu"), sections).numpy(), sections)
    landing = device.Landings(torch.device("cpu")).take((2, 1, 2, 2))
    for z, grey in enumerate(([[0, 128], [100, 255]], [[1, 2], [3, 4]])):
        landing.put(z, torch.tensor([grey], dtype=torch.uint8))
    landing.close(torch.tensor(1.0))
    with landing.finish() as found:
        assert found.tolist() == [[[[0, 128], [100, 255]]], [[[1, 2], [3, 4]]]]


def test_landings_are_used_again_when_they_are_free_and_large_enough() -> None:
    landings = device.Landings(torch.device("cpu"))
    first, second = landings.take((2, 1, 2, 2)), landings.take((2, 1, 2, 2))
    places = []
    for landing in (first, second):
        landing.close(torch.tensor(0.0))
        with landing.finish() as found:
            places.append(found.ctypes.data)
    assert places[0] != places[1], "both were out"
    for shape, known in (((1, 1, 2, 2), True), ((3, 1, 2, 2), False)):
        landing = landings.take(shape)
        landing.close(torch.tensor(0.0))
        with landing.finish() as found:
            assert found.shape == shape
            assert (found.ctypes.data in places) == known


class Constant(torch.nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def encode_section(self, section: torch.Tensor) -> torch.Tensor:
        return section

    def fuse_window(self, states: list[torch.Tensor], cut: int) -> torch.Tensor:
        return self.values.view(1, 1, 2, -1).repeat(len(states[0]), 1, 1, 1)


def test_grey_levels_are_rounded_and_clamped() -> None:
    network = Network(describe(NetworkConfig(name="nearest", scale=8)))
    network.module = Constant(-1.0, 0.5, 100.4 / 255, 2.0)
    grey, total = network.fuse([torch.zeros(3, 1, 8, 8)])
    assert grey.tolist() == [[[0, 128], [100, 255]]] * 3
    assert total == pytest.approx(3 * (1.5 + 100.4 / 255))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_made_grey(value: float) -> None:
    network = Network(describe(NetworkConfig(name="nearest", scale=8)))
    network.module = Constant(0.0, value, 1.0, 0.5)
    landing = device.Landings(torch.device("cpu")).take((1, 1, 2, 2))
    grey, total = network.fuse([torch.zeros(1, 1, 8, 8)])
    landing.put(0, grey)
    landing.close(total)
    with pytest.raises(DataError, match="no numbers"), landing.finish():
        pass
