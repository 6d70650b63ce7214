"""What volume.yaml does not say of its network: chosen by volume and workers, and kept by whoever resumes (law 3)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import main_job, run_here, texture, tree, volume_yaml, write_lr
from distributed import Client, LocalCluster, get_worker
from hypothesis import given
from hypothesis import strategies as st

from models.memory import WARM_BYTES
from pipeline import run, verify
from pipeline.base.errors import ClusterError, LedgerError, SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.config import volume as config
from pipeline.config.volume import NetworkConfig
from pipeline.inference import defaults
from pipeline.inference.describe import describe
from pipeline.inference.footprint import footprint, needed_bytes, too_large
from pipeline.plan.lattice import Lattice
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.prepare import chosen
from pipeline.prepare.place import check_place, claim
from pipeline.prepare.prepare import prepare, settled
from pipeline.prepare.prepared import Prepared
from pipeline.prepare.specification import digest
from pipeline.process import device
from pipeline.process.device import Facts
from pipeline.schedule import ask
from pipeline.worker.check import refuse_other_precision

CPU = Facts("cpu x86_64", 16 << 30, ("float32", "bfloat16"))
GPU = Facts("cuda NVIDIA H100 80GB HBM3", 80 << 30, ("float32", "tf32", "bfloat16", "float16"))
OLD_GPU = Facts("cuda Tesla V100", 16 << 30, ("float32", "float16"))
PAPER = NetworkSpec("gpemsr", 8, "paper", "0" * 64, "float32", Lattice(64, 16, 5, "mirror"), "w.pth")


def bounds(height: int, width: int, y: int = 0, x: int = 0) -> Box:
    return Box.at(ZYX(0, y, x), ZYX(5, height, width))


def lattice(within: Box, scale: int = 8, **stated: Any) -> tuple[int, int]:
    """(cell, halo) that a volume of gpemsr gets."""
    network = NetworkConfig(name="gpemsr", scale=scale, weights="builtin", **stated)
    found = defaults.lattice_for(describe(network), network, within)
    return found.cell, found.halo


@pytest.mark.parametrize(
    ("within", "wanted"),
    [
        (bounds(30, 30), (32, 0)),
        (bounds(5, 3), (8, 0)),
        (bounds(64, 17), (64, 0)),
        (bounds(100, 128), (128, 0)),
        (bounds(30, 30, 100, 200), (48, 0)),  # 96..144 and 192..240; cells of 32 and 40 have a border inside
        (bounds(30, 30, -15, 0), (64, 16)),  # voxel 0, inside, is a border of every cell: 2 tiles of either size
        (bounds(129, 8), (64, 16)),  # 3 tiles of 96 x 96 against 2 of 160 x 160
        (bounds(130, 130), (64, 16)),  # 9 tiles of 96 x 96 against 4 of 160 x 160
        (bounds(200, 200), (128, 16)),  # 16 against 4
        (bounds(4000, 4000), (128, 16)),
    ],
)
def test_the_lattice_of_a_volume_by_hand(within: Box, wanted: tuple[int, int]) -> None:
    assert lattice(within) == wanted


def test_what_is_stated_of_the_lattice_stays() -> None:
    assert lattice(bounds(30, 30), cell=64) == (64, 16)
    assert lattice(bounds(30, 30), halo=8) == (32, 8)
    assert lattice(bounds(4000, 4000), scale=16, halo=0) == (64, 0), "as few voxels as 128: the smaller tile"
    for name in ("nearest", "bicubic"):
        network = NetworkConfig(name=name, scale=8)
        assert defaults.lattice_for(describe(network), network, bounds(30, 30)).cell == 64


@given(st.integers(1, 300), st.integers(1, 300), st.integers(-200, 200), st.integers(-200, 200))
def test_a_volume_within_one_cell_is_one_tile_of_the_smallest_cell(height: int, width: int, y: int, x: int) -> None:
    within = bounds(height, width, y, x)
    cell, halo = lattice(within)
    one = {c for c in range(8, 129, 8) if len(list(Lattice(c, 0, 5, "mirror").cells(within))) == 1}
    assert cell == min(one) if one else cell in (64, 128)
    assert (halo == 0) == bool(one)


@given(st.integers(8, 128), st.integers(0, 24), st.integers(-300, 300), st.integers(1, 500), st.integers(1, 500))
def test_tiles_are_counted_as_cells_are_cut(cell: int, halo: int, start: int, height: int, width: int) -> None:
    one, box = Lattice(cell, halo, 5, "mirror"), bounds(height, width, start, -start)
    assert one.tiles(box) == len(list(one.cells(box)))


LARGE = bounds(4000, 4000)


def batch(tile: int, workers: list[Facts], within: Box = LARGE, network: NetworkSpec = PAPER) -> int:
    return defaults.batch_for(replace(network, lattice=Lattice(tile, 0, 5, "mirror")), within, workers)


def test_a_batch_fills_a_gpu_by_hand() -> None:
    """8 tiles of 96 x 96 LR voxels, or the next power of two of smaller or larger ones."""
    assert [batch(tile, [GPU, GPU]) for tile in (32, 64, 96, 112, 160, 176, 400)] == [64, 32, 8, 8, 4, 4, 1]


def test_a_batch_is_one_tile_where_a_cpu_computes() -> None:
    assert [batch(96, workers) for workers in ([CPU], [GPU, CPU], [])] == [1, 1, 1]


def test_a_batch_has_no_more_tiles_than_the_volume() -> None:
    """Else a small volume would be computed eight times. Box and slab do not count: they are not known here."""
    assert [batch(96, [GPU], bounds(size, 96)) for size in (96, 97, 300, 900)] == [1, 2, 4, 8]


@given(st.integers(1, 80), st.sampled_from(["float32", "tf32", "bfloat16"]))
def test_a_batch_fits_the_least_memory(gib: int, precision: str) -> None:
    network = replace(PAPER, precision=precision)
    found = batch(96, [GPU, replace(GPU, memory_bytes=gib << 30)], network=network)
    assert found in (1, 2, 4, 8)

    def needed(count: int) -> int:
        held = footprint(replace(network, lattice=Lattice(96, 0, 5, "mirror"), batch=count), gpu=True)
        return held.tile_bytes + count * held.cache_bytes

    assert found == 1 or needed(found) <= 0.6 * (gib << 30)
    assert found == 8 or needed(2 * found) > 0.6 * (gib << 30)


def test_a_batch_multiplies_what_is_held() -> None:
    """But for what a process keeps once. A slab's caches are those of whole batches."""
    one, four = footprint(PAPER), footprint(replace(PAPER, batch=4))
    assert four.tile_bytes - WARM_BYTES == 4 * (one.tile_bytes - WARM_BYTES) > 0
    assert [four.cached_bytes(tiles) // one.cache_bytes for tiles in (1, 4, 5)] == [4, 4, 8]
    assert one.cached_bytes(5) == 5 * one.cache_bytes


def test_where_memory_ends_a_smaller_batch_comes_before_a_smaller_cell() -> None:
    slab, four = bounds(128, 128), replace(PAPER, batch=4)
    said = too_large(four, slab, needed_bytes(replace(PAPER, batch=2), slab))
    assert "4 tiles at once of 96 x 96 LR voxels" in said.saw
    assert said.wanted == "network.batch 2 or less"
    assert too_large(four, slab, needed_bytes(PAPER, slab) - 1).wanted.startswith("network.cell ")


def test_tf32_where_every_worker_has_it() -> None:
    found = [defaults.precision_for(w) for w in ([GPU], [GPU, GPU], [GPU, CPU], [GPU, OLD_GPU], [OLD_GPU], [CPU], [])]
    assert found == ["tf32", "tf32", *["float32"] * 5]


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [
        ((6, 1), ("float32",)),
        ((7, 0), ("float32", "float16")),
        ((7, 5), ("float32", "float16")),
        ((8, 0), ("float32", "tf32", "bfloat16", "float16")),
        ((9, 0), ("float32", "tf32", "bfloat16", "float16")),
    ],
)
def test_what_a_gpu_computes_in(
    capability: tuple[int, int], wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its compute capability; P100, V100, T4, A100 and H100."""
    card = SimpleNamespace(major=capability[0], minor=capability[1], total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla")
    assert device.facts(torch.device("cuda", 0)) == Facts("cuda Tesla", 16 << 30, wanted)


def test_what_a_cpu_computes_in() -> None:
    assert device.facts(torch.device("cpu")).precisions == CPU.precisions


def test_what_is_stated_of_precision_and_batch_stays() -> None:
    keys: dict[str, Any] = {"name": "gpemsr", "scale": 8, "weights": "builtin"}
    for stated, wanted in [
        ({}, ("tf32", 8)),
        ({"precision": "bfloat16"}, ("bfloat16", 8)),
        ({"batch": 3}, ("tf32", 3)),
        ({"precision": "float16", "batch": 2}, ("float16", 2)),
    ]:
        network = NetworkConfig(**keys, **stated)
        found = defaults.for_workers(describe(network), network, LARGE, [GPU])
        assert (found.precision, found.batch) == wanted
        assert defaults.undecided(network) == (len(stated) < 2)
    exact = NetworkConfig(name="bicubic", scale=8)
    assert defaults.for_workers(describe(exact), exact, LARGE, [GPU]) == describe(exact)
    assert not defaults.undecided(exact)


GPEMSR = {"network__name": "gpemsr", "network__weights": "builtin", "target__mips": 1}


def prepared(folder: Path, **keys: Any) -> Prepared:
    return prepare(config.load(volume_yaml(folder / "v.yaml", "lr.zarr", "sr", **GPEMSR, **keys)))


def network_of(one: Prepared) -> tuple[int, int, str, int]:
    network = one.job.network
    assert one.job.plan.lattice == network.lattice
    return network.lattice.cell, network.lattice.halo, network.precision, network.batch


def test_a_target_of_before_goes_on_without_its_numbers_in_the_file(tmp_path: Path) -> None:
    """Cell 64, halo 16 and float32 were the defaults. The digest has no new key, and `verify` sees the same plan."""
    write_lr(tmp_path / "lr.zarr", texture((4, 30, 30)))
    begun = prepared(tmp_path, network__cell=64, network__halo=16, network__precision="float32", network__batch=1)
    assert begun.spec["network"].keys() == {
        *("name", "scale", "preset", "weights_sha256", "precision", "weights_licence")
    }
    claim(begun)
    again = prepared(tmp_path)
    assert network_of(again) == (64, 16, "float32", 1)
    assert again.job.digest == begun.job.digest
    assert check_place(again)
    assert verify.main([str(tmp_path / "v.yaml")]) == 1, "it is not written yet, and not another plan's"
    with pytest.raises(LedgerError, match=r"network\.cell was 64, is 32"):
        check_place(prepared(tmp_path, network__cell=32))
    with pytest.raises(LedgerError, match=r'network\.precision was "float32", is "tf32"'):
        check_place(prepared(tmp_path, network__precision="tf32"))
    with pytest.raises(LedgerError, match=r"network\.batch was None, is 2"):
        check_place(prepared(tmp_path, network__batch=2))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_kernels_are_no_autocast(precision: str, tmp_path: Path) -> None:
    """A target that an earlier commit began with kernels cast in every call has other bytes: it is refused."""
    write_lr(tmp_path / "lr.zarr", texture((4, 30, 30)))
    begun = prepared(tmp_path, network__precision=precision)
    network = {key: value for key, value in begun.spec["network"].items() if key != "kernels"}
    old = begun.spec | {"network": network}
    claim(replace(begun, spec=old, job=replace(begun.job, digest=digest(old))))
    with pytest.raises(LedgerError, match=r'network\.kernels was None, is "stored"'):
        check_place(prepared(tmp_path))


@pytest.mark.parametrize("lost", [False, True])
def test_what_the_first_workers_had_is_kept(lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever resumes, also where plan.json is lost and the target's provenance alone tells."""
    write_lr(tmp_path / "lr.zarr", texture((4, 130, 130)))
    first = settled(prepared(tmp_path), [GPU])
    assert network_of(first) == (64, 16, "tf32", 8)
    assert network_of(prepared(tmp_path)) == (64, 16, "float32", 1), "nothing is recorded yet"
    claim(first)
    if lost:
        (tmp_path / "sr.emsr" / "ledger-x").mkdir()
        (tmp_path / "sr.emsr" / "plan.json").write_text("{}")
    monkeypatch.setattr(device, "facts", lambda _: OLD_GPU)
    for workers in ([CPU], [OLD_GPU], [GPU]):
        again = settled(prepared(tmp_path), workers)
        assert network_of(again) == (64, 16, "tf32", 8)
        assert again.job.digest == first.job.digest


def test_a_box_has_the_lattice_and_batch_of_its_volume(tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", texture((4, 130, 130)))
    box = {"start": [0, 3, 5], "stop": [4, 9, 11]}
    whole, part = (settled(prepared(tmp_path, **keys), [GPU]) for keys in ({}, {"source__box": box}))
    assert network_of(part) == network_of(whole)


def test_a_box_has_the_voxels_of_its_volume(tmp_path: Path) -> None:
    """Law 1 on the one cell that covers a small volume, whatever the slabs; the box alone would have a smaller one."""
    write_lr(tmp_path / "lr.zarr", texture((3, 24, 24)))
    run_here(volume_yaml(tmp_path / "a.yaml", "lr.zarr", "a", **GPEMSR))
    box = {"start": [1, 3, 5], "stop": [3, 14, 11]}
    keys = GPEMSR | {"source__box": box, "work__slab_shape": [2, 16, 16]}
    job = run_here(volume_yaml(tmp_path / "b.yaml", "lr.zarr", "b", **keys))
    assert job.plan.lattice == Lattice(24, 0, 5, "mirror")
    whole, part = (np.asarray(zarr.open_array(tmp_path / name / "0", mode="r")) for name in "ab")
    assert (part == whole[1:3, 24:112, 40:88]).all()


def test_settling_looks_at_no_section_again(tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", texture((6, 130, 130)))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **GPEMSR, source__bad_sections={"detect": True})
    looked: list[int] = []
    found = prepare(config.load(path), lambda survey, source: looked.append(1) or {2: "dark"})
    assert settled(found, [GPU]).job.plan.bad_sections == (2,)
    assert looked == [1]


def test_a_device_without_the_precision_is_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "facts", lambda _: OLD_GPU)
    refuse_other_precision(replace(PAPER, precision="float16"))
    with pytest.raises(ClusterError) as refused:
        refuse_other_precision(replace(PAPER, precision="tf32"))
    assert "tf32, and the device here is cuda Tesla V100, which computes in float32, float16" in refused.value.saw
    assert refused.value.wanted == "a GPU that computes in tf32"


def test_workers_decide_and_not_the_client(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The client here has no GPU. Its own workers cannot go on with what others began, and nothing is written."""
    write_lr(tmp_path / "lr.zarr", texture((2, 24, 24)))
    keys = GPEMSR | {"network__cell": 16, "network__halo": 0, "work__slab_shape": [2, 16, 16]}
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys)
    said = main_job(path, "run_gpu_facts.py").stderr
    spec = json.loads((tmp_path / "sr.emsr" / "plan.json").read_text())["spec"]
    assert (spec["network"]["precision"], spec["network"]["batch"]) == ("tf32", 4)
    (told,) = (line for line in map(json.loads, _progress(said)) if line["event"] == "network")
    assert (told["precision"], told["batch"], told["cell"]) == ("tf32", 4, 16)

    next((tmp_path / "sr" / "0").rglob("c/*/*/*")).unlink()
    assert verify.main([str(path), "--requeue"]) == 1, "it reads, and computes nothing"
    before = tree(tmp_path)
    capsys.readouterr()
    assert run.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert "network.precision of this target is tf32, and the device here is cpu" in error
    assert "Wanted: a GPU that computes in tf32" in error
    assert "Traceback" not in error
    assert tree(tmp_path) == before
    assert "The network is not tried on this machine: network.precision" in _dry_run(path, capsys)


def _progress(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("{")]


def _dry_run(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run.main([str(path), "--dry-run"]) == 0
    return capsys.readouterr().out


def test_gpus_go_on_in_what_a_cpu_began(tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    claim(settled(prepared(tmp_path), [CPU]))
    before = (tmp_path / "sr.emsr" / "plan.json").read_bytes()
    main_job(tmp_path / "v.yaml", "run_gpu_facts.py")
    assert (tmp_path / "sr.emsr" / "plan.json").read_bytes() == before
    assert json.loads(before)["spec"]["network"]["precision"] == "float32"


@pytest.fixture(scope="module")
def client() -> Any:
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as found,
    ):
        yield found


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_who_does_not_answer_is_left_out(
    fault: str, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that raises an error is found unfit later; one that hangs holds up nobody for ever."""
    monkeypatch.setattr(ask, "GRACE_S", 0.5)
    monkeypatch.setattr(ask, "SAY_S", 0.1)
    _FREE.clear()
    answer: Callable[[], Any] = _raise_on_one if fault == "raises" else _hang_on_one
    try:
        assert ask.ask_workers(client, answer, "what they are called") == [1]
    finally:
        _FREE.set()
    if fault == "hangs":
        assert "waiting for 1 of 2 workers to say what they are called" in capsys.readouterr().err


_FREE = threading.Event()


def _raise_on_one() -> int:
    if (name := int(get_worker().name)) == 0:
        raise SourceError("no driver")
    return name


def _hang_on_one() -> int:
    if (name := int(get_worker().name)) == 0:
        _FREE.wait()
    return name


def _hang() -> None:
    _FREE.wait()


def test_no_answer_at_all_is_an_error(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "NO_WORKER_S", 0.5)
    _FREE.clear()
    try:
        with pytest.raises(ClusterError, match="no worker answered"):
            ask.ask_workers(client, _hang, "anything")
    finally:
        _FREE.set()


def test_what_is_computed_in_vain_is_said(tmp_path: Path) -> None:
    """Of the network, whose every tile costs; not of an interpolation."""
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    region = bounds(512, 512)

    def said(slab: ZYX, batch: int, network: NetworkSpec = PAPER) -> list[str]:
        plan = Plan(region, region, slab, 8, Lattice(128, 16, 5, "mirror"), (), None)
        return list(chosen.in_vain(replace(job, network=replace(network, batch=batch), plan=plan)))

    job = prepared(tmp_path).job
    assert said(ZYX(8, 512, 512), 4) == []
    assert said(ZYX(8, 64, 64), 1, replace(PAPER, weights="")) == []
    (cells,) = said(ZYX(8, 64, 64), 1)
    assert "computed 4.0 times: work.slab_shape (8, 64, 64) is no multiple of network.cell 128" in cells
    (repeats,) = said(ZYX(8, 128, 384), 8)
    assert "5 of 8 tiles are repeats, since a slab has 3 and network.batch is 8" in repeats
    assert repeats.endswith("network.batch 3")
