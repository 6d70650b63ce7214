"""Law 6: what a run costs on devices that are elsewhere, by the exact count of its network's calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import standin
import torch
from conftest import REPOSITORY, texture, tree, volume_yaml, write_lr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plans

import models
from pipeline import run
from pipeline.base.errors import UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config import volume
from pipeline.config.cluster import ClusterConfig
from pipeline.plan.lattice import Lattice
from pipeline.plan.measured_devices import MEASURED_DEVICES
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.plan.price import Calls, network_calls, slab_seconds
from pipeline.plan.rates import MeasuredDevice, Rate
from pipeline.plan.receipt import WRITTEN
from pipeline.prepare import measured
from pipeline.prepare.hours import Fleet, Hours
from pipeline.prepare.measured import check_precision, measured_device
from pipeline.prepare.place import claim
from pipeline.prepare.prepare import prepare
from pipeline.schedule.leases import lease_seconds, tasks_in
from pipeline.worker.job import SlabCost
from pipeline.worker.lease import process_lease

SMALL = NetworkSpec("gpemsr", 8, "small", "", "float32", Lattice(64, 16, 5, "mirror"))


@st.composite
def plans_with_bad_sections(draw: st.DrawFn) -> Plan:
    plan = draw(plans())
    sections = range(plan.bounds.start.z, plan.bounds.stop.z)
    bad = draw(st.sets(st.sampled_from(sections), max_size=len(sections) - 1))
    return replace(plan, bad_sections=tuple(sorted(bad)))


def leases(plan: Plan, slabs: int) -> list[list[int]]:
    """Numbers of the slabs of each lease, as the scheduler cuts them: consecutive, of one column."""
    columns = [list(range(i, i + plan.grid.z)) for i in range(0, plan.slabs, plan.grid.z)]
    return [column[i : i + slabs] for column in columns for i in range(0, len(column), slabs)]


def counted(plan: Plan, batch: int, slabs_per_lease: int) -> Calls:
    """The calls, slab by slab, of workers that keep the sections of the last window from slab to slab."""
    encoded = fused = 0
    for lease in leases(plan, slabs_per_lease):
        kept: set[int] = set()
        for slab in map(plan.slab, lease):
            tiles = -(-sum(1 for _ in plan.lattice.cells(slab.lr)) // batch) * batch
            if plan.lattice.window == 1:
                kept = set()
            for z in range(slab.lr.start.z, slab.lr.stop.z):
                window = {plan.section(z + d) for d in range(-plan.lattice.z_halo, plan.lattice.z_halo + 1)}
                encoded += tiles * len(window - kept)
                fused += tiles
                kept = window
    return Calls(encoded, fused)


@given(plans_with_bad_sections(), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=150)
def test_the_formula_counts_every_call(plan: Plan, batch: int, slabs_per_lease: int) -> None:
    assert network_calls(plan, batch, slabs_per_lease) == counted(plan, batch, slabs_per_lease)


def test_the_formula_carries_nothing_where_a_window_is_one_section() -> None:
    """Two slabs of two sections: the second begins with a bad one, for which the last of the first stands in."""
    box = Box.of((0, 0, 0), (4, 8, 8))
    plan = Plan(box, box, ZYX(2, 8, 8), 8, Lattice(8, 0, 1, "edge"), (), None, bad_sections=(2,))
    assert network_calls(plan, 1, 2) == Calls(encoded=4, fused=4) == counted(plan, 1, 2)


@given(plans_with_bad_sections(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60)
def test_longer_leases_never_cost_more_and_larger_batches_never_less(
    plan: Plan, batch: int, times: int, slabs: int
) -> None:
    calls = network_calls(plan, batch, slabs)
    longer = network_calls(plan, batch, slabs * times)
    assert longer.encoded <= calls.encoded
    assert longer.fused == calls.fused
    padded = network_calls(plan, batch * times, slabs)
    assert padded.encoded >= calls.encoded
    assert padded.fused >= calls.fused


@given(plans_with_bad_sections(), st.integers(1, 4))
@settings(max_examples=60)
def test_calls_of_columns_add_up(plan: Plan, batch: int) -> None:
    """Regions of one slab in y and x, over the same lattice."""
    step = plan.slab_shape
    parts = []
    for iy in range(plan.grid.y):
        for ix in range(plan.grid.x):
            first = plan.slab((iy * plan.grid.x + ix) * plan.grid.z).lr
            stop = ZYX(plan.region.stop.z, first.stop.y, first.stop.x)
            parts.append(network_calls(replace(plan, region=replace(first, stop=stop), slab_shape=step), batch, 2))
    assert network_calls(plan, batch, 2) == Calls(sum(p.encoded for p in parts), sum(p.fused for p in parts))


class Counting(standin.StandIn):
    """Counts tiles."""

    def __init__(self, scale: int) -> None:
        super().__init__(scale)
        self.encoded = self.fused = 0

    def encode_section(self, section: torch.Tensor) -> torch.Tensor:
        self.encoded += len(section)
        return super().encode_section(section)

    def fuse_window(self, states: list[torch.Tensor], cut: int = 0) -> torch.Tensor:
        self.fused += len(states[0])
        return super().fuse_window(states, cut)


@pytest.mark.parametrize(("slabs_per_lease", "batch"), [(1, 1), (2, 3), (4, 4)])
def test_a_run_calls_its_network_as_often_as_the_formula_says(
    slabs_per_lease: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real leases of real slabs of a box that ends within cells, between other sections and beside bad ones."""
    traits = replace(models.NETWORKS["nearest"], window=5, padding="mirror", cell=16, halo={8: 8, 16: 8})
    network = Counting(8)
    monkeypatch.setitem(models.NETWORKS, "nearest", traits)
    monkeypatch.setattr(models, "build", lambda name, scale, preset=None: network)
    write_lr(tmp_path / "lr.zarr", texture((12, 70, 50)))
    path = volume_yaml(
        tmp_path / "v.yaml",
        "lr.zarr",
        "sr",
        network__name="nearest",
        source__box={"start": [1, 10, 3], "stop": [12, 70, 50]},
        source__bad_sections={"list": [0, 4, 5, 6, 9]},
        work__slab_shape=[2, 16, 32],
    )
    prepared = prepare(volume.load(path))
    claim(prepared)
    job, plan = replace(prepared.job, network=replace(prepared.job.network, batch=batch)), prepared.job.plan
    assert plan.grid == ZYX(6, 4, 2)
    for lease in leases(plan, slabs_per_lease):
        receipts = process_lease(job, lease[0], lease[-1] + 1).receipts
        assert [r.state for r in receipts] == [WRITTEN] * len(lease)
    assert Calls(network.encoded, network.fused) == network_calls(plan, batch, slabs_per_lease)


def test_parts_of_a_slab_overlap_as_far_as_slabs_in_flight_allow() -> None:
    assert slab_seconds(1, 5, 2, in_flight=1) == 8
    assert slab_seconds(1, 5, 2, in_flight=2) == 5
    assert slab_seconds(3, 4, 3, in_flight=2) == 5
    assert slab_seconds(3, 4, 6, in_flight=3) == 6


def fleet(price: float | None = None, in_flight: int = 1) -> Fleet:
    return Fleet(4, in_flight, 3600, price, lambda slab_s: tasks_in(lease_seconds(4), slab_s))


def test_the_slowest_part_decides_and_workers_are_paid_for_it() -> None:
    """3600 slabs: a second for each is an hour."""
    cost = SlabCost(1, 0, 3, {}, 0)
    hours = fleet(2.5, in_flight=2).hours(cost, 2)
    assert hours == Hours(device=2, workers=3)
    assert fleet(2.5).money(hours) == "7.50"
    assert fleet().money(hours) == ""
    assert fleet().hours(cost, 2) == Hours(device=2, workers=6)


def test_leases_are_as_long_as_the_scheduler_makes_them() -> None:
    """By hand: 10 slabs of 4 sections in z, a tile each, 0.1 s a call, leases of 5 s.

    One slab a lease would encode 6 + 8 x 8 + 6 sections and take 1.16 s a slab, so that four make a lease. Those encode
    18 + 20 + 10 and take 0.88 s, so that five do: 22 + 22 sections, 0.84 s, five again. Where two threads share the
    device a slab takes 2.32 s, so that two make a lease: 10 + 3 x 12 + 10 sections, 0.96 s, two again.
    """
    box = Box.of((0, 0, 0), (40, 64, 64))
    plan = Plan(box, box, ZYX(4, 64, 64), 8, SMALL.lattice, (), None)
    fit = device(rate(encode_ms=100, fuse_ms=100.0)).fits(SMALL)["float32"]
    assert fleet().network_seconds(plan, 1, fit, SlabCost(0, 0, 0, {}, 0)) == pytest.approx(0.84)
    assert fleet(in_flight=2).network_seconds(plan, 1, fit, SlabCost(0, 0, 0, {}, 0)) == pytest.approx(0.96)
    assert fleet().network_seconds(plan, 1, fit, SlabCost(0, 0, 9, {}, 0)) == pytest.approx(1.16), "encoding is slow"


def device(*rates: Rate, kind: str = "cuda NVIDIA X") -> MeasuredDevice:
    return MeasuredDevice(kind, 9, "2027-01-01", "here", rates)


def rate(tile: int = 96, batch: int = 1, precision: str = "float32", encode_ms: float = 10, **other: Any) -> Rate:
    known = {"name": "gpemsr", "preset": "small", "scale": 8, "halo": 16, "fuse_ms": 30.0} | other
    return Rate(cell=tile - 2 * known["halo"], precision=precision, batch=batch, encode_ms=encode_ms, **known)


def test_a_rate_holds_for_its_own_network_and_tile() -> None:
    other = (rate(encode_ms=1, scale=16), rate(encode_ms=1, preset="paper"), rate(encode_ms=1, name="else"))
    fits = device(*other, rate(), rate(precision="tf32", encode_ms=4)).fits(SMALL)
    assert list(fits) == ["float32", "tf32"]
    assert fits["float32"].tile_ms == 40
    assert fits["tf32"].seconds(Calls(1000, 100)) == 4 + 3
    assert device(*other).fits(SMALL) == {}


@pytest.mark.parametrize(
    ("tiles", "taken", "scaled"),
    [((96, 160), 96, 1), ((64, 160), 64, 2.25), ((80, 160), 80, 1.44), ((48, 144), 144, 4 / 9)],
)
def test_another_tile_takes_the_nearest_ones_time_for_each_voxel(
    tiles: tuple[int, ...], taken: int, scaled: float
) -> None:
    fit = device(*(rate(tile) for tile in tiles)).fits(SMALL)["float32"]
    assert fit.rate.tile == taken
    assert fit.scaled == pytest.approx(scaled)
    assert fit.seconds(Calls(1000, 1000)) == pytest.approx(40 * scaled)


def test_the_nearest_batch_is_taken_of_the_nearest_tile() -> None:
    gpu = device(rate(batch=1, encode_ms=16), rate(batch=4, encode_ms=8), rate(160, 2, encode_ms=1))
    taken = {b: gpu.fits(replace(SMALL, batch=b))["float32"] for b in (1, 2, 3, 64)}
    assert {b: fit.rate.batch for b, fit in taken.items()} == {1: 1, 2: 1, 3: 4, 64: 4}
    assert [fit.same_batch for fit in taken.values()] == [True, False, False, False]


def test_devices_that_come_with_emsr_are_those_of_the_document() -> None:
    """Every rate is a row of docs/performance.md, "On a GPU": its milliseconds are those of encoding and fusing."""
    rows: dict[tuple[str, int, int, str], float] = {}
    tile = ("", 0, 0)
    text = (REPOSITORY / "docs" / "performance.md").read_text(encoding="utf-8").split("\n## On a GPU\n")[1]
    for first, way, batch, ms in re.findall(r"^\| ([^|]*)\| ([^|]+) \| (\d+) \| ([\d.]+) \|", text, re.M):
        if found := re.match(r"(\w+) x(\d+), (\d+)", first):
            tile = (found[1], int(found[2]), int(found[3]))
        if batch == "1":
            rows[*tile, way] = float(ms)
    (h100,) = MEASURED_DEVICES
    assert h100.date in text
    for known in h100.rates:
        key = (known.preset or "", known.scale, known.tile, known.precision)
        if key != ("small", 8, 96, "tf32"):  # the document names only its graphs
            assert known.encode_ms + known.fuse_ms == pytest.approx(rows[key], rel=1e-3)


def doctor(folder: Path, *rates: Rate, kind: str = "cuda NVIDIA X", memory_bytes: int = 9) -> Path:
    """A file as `emsr doctor --json` writes it, with keys that a price does not read."""
    written = [vars(each) | {"sr_voxels_per_s": 1e6, "tflops": 3.5, "psnr_db": None, "peak_bytes": 5} for each in rates]
    report = {
        "emsr": "0.1.0",
        "date": "2027-01-01",
        "machine": {"torch": "2.14"},
        "ok": True,
        "devices": [
            {"kind": "cpu x86_64", "memory_bytes": 9, "matrix_tflops": {"float32": 0.1}, "rates": [vars(rate())]},
            {
                "kind": kind,
                "memory_bytes": memory_bytes,
                "matrix_tflops": {"tf32": 300},
                "vectors": [],
                "rates": written,
            },
        ],
    }
    path = folder / "doctor.json"
    path.write_text(json.dumps(report))
    return path


def small_run(folder: Path, **changes: Any) -> Path:
    """gpemsr x8 on tiles of 48 x 48: two slabs of four tiles."""
    write_lr(folder / "lr.zarr", texture((8, 32, 32)))
    shapes = {"target__chunk_shape": [4, 64, 64], "target__shard_shape": [4, 256, 256], "work__slab_shape": [4, 32, 32]}
    network = {"name": "gpemsr", "scale": 8, "weights": "builtin", "cell": 16, "halo": 16}
    return volume_yaml(folder / "v.yaml", "lr.zarr", "sr", network=network, **shapes, **changes)


def cells(text: str) -> dict[str, list[str]]:
    """The rows of rich's tables, by their first cell."""
    found = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]
    return {first: rest for first, *rest in found}


@pytest.mark.parametrize("masked", [False, True])
def test_the_price_of_a_measured_device(masked: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: 2 slabs of 4 tiles x (6 sections + 4 windows), 90 s and 180 s each in float32, are 10080 s = 2.8 hours.

    In bfloat16 tiles of 96 x 96 were measured, so that a tile takes a quarter of their time: half of float32's.
    A mask leaves the first slab alone.
    """
    path = small_run(
        tmp_path,
        cluster={
            "kind": "address",
            "address": "tcp://h:1",
            "workers": 4,
            "measured": "d/r.json",
            "price_per_hour": 2.5,
        },
        network__precision="float32",
        network__batch=1,
        **({"source__mask": {"url": "mask.zarr"}} if masked else {}),
    )
    if masked:
        inside = np.zeros((8, 32, 32), np.uint8)
        inside[:4] = 1
        write_lr(tmp_path / "mask.zarr", inside)
    (tmp_path / "d").mkdir()
    slow = rate(48, encode_ms=90_000, fuse_ms=180_000.0)
    coarse = rate(96, 8, "bfloat16", encode_ms=180_000, fuse_ms=360_000.0)
    doctor(tmp_path, slow, coarse).rename(tmp_path / "d" / "r.json")
    before = tree(tmp_path)
    assert run.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert tree(tmp_path) == before
    rows = cells(said)
    assert rows["float32 (chosen)"][:2] == ["270000.0", "tile 48, batch 1"]
    assert rows["bfloat16"][:2] == ["135000.0", "tile 96, batch 8"]
    # of the four workers as many have work as there are slabs
    whole = ["2.80", "2.8 hours", "1.4 hours", "7.00"]
    half = ["1.40", "1.4 hours", "1.4 hours" if masked else "42.0 minutes", "3.50"]
    quarter = ["0.70", "42.0 minutes", "42.0 minutes", "1.75"]
    assert f"workers  {1 if masked else 2} of 4 get a slab" in said
    found = [rows[name][2:] for name in ("float32 (chosen)", "bfloat16")]
    assert found == ([half, quarter] if masked else [whole, half])
    assert (
        "bfloat16 was not measured at tile 48, batch 1: hours are those of tile 96, batch 8, by voxels (x 0.25)" in said
    )
    assert "cuda NVIDIA X, measured on 2027-01-01" in said
    assert "s read" in said
    assert "s network" not in said, "the network is not tried on this machine"


def test_what_the_file_does_not_leave_open_is_chosen_for_the_measured_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the first run on such workers would: tf32, and a batch as large as a section of this small volume."""
    path = small_run(tmp_path, cluster={"measured": "doctor.json", "workers": 1})
    doctor(tmp_path, rate(48), rate(48, 4, "tf32"), memory_bytes=80 << 30)
    assert run.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "precision tf32, batch 4 (precision and batch by the device of cluster.measured" in said
    assert {"float32", "tf32 (chosen)"} <= cells(said).keys()
    assert "float32 was not measured at tile 48, batch 4: hours are those of tile 48, batch 1, by voxels" in said
    assert "tf32 was not measured" not in said


@pytest.mark.parametrize("precision", [None, "tf32"])
def test_workers_elsewhere_are_priced_by_the_devices_that_come_with_emsr(
    precision: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a login node: hours, if any, are this CPU's, which has no tf32; beside them stand those of a GPU."""
    elsewhere = {"kind": "address", "address": "tcp://h:1", "workers": 4, "price_per_hour": 2}
    path = small_run(tmp_path, cluster=elsewhere, network__precision=precision)
    assert run.main([str(path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    said = " ".join(text.split())
    tried = precision is None
    assert ("one worker like this machine's CPU" in said) == tried
    assert ("at 2 an hour" in said) == tried
    assert ("The network is not tried on this machine" in said) != tried
    assert "set cluster.measured" in said
    assert "cuda NVIDIA H100 80GB HBM3, measured on 2026-11-27 (eager" in said
    assert {"float32", "tf32 (chosen)"} <= cells(text).keys()
    assert "float32 was not measured at tile 48, batch" in said


def test_workers_like_this_machine_are_priced_by_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lr(tmp_path / "lr.zarr", texture((4, 32, 32)))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster__price_per_hour=3)
    assert run.main([str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "on one worker like this machine, " in said
    assert "at 3 an hour" in said
    assert "H100" not in said


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, r"cannot be read \(No such file"),
    "a folder": (lambda path: path.mkdir(), r"cannot be read \(Is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "is not JSON"),
    "no JSON": (lambda path: path.write_bytes(b"cuda NVIDIA H100"), "is not JSON"),
    "no text": (lambda path: path.write_bytes(bytes(range(256))), "is not JSON"),
    "nested": (lambda path: path.write_text("[" * 100_000), "is not JSON"),
    "a list": (lambda path: path.write_text("[]"), "does not have doctor's keys"),
    "no devices": (lambda path: path.write_text('{"emsr": "1", "date": "today"}'), "doctor's keys: devices"),
    "of a rate": (
        lambda path: doctor(path.parent, rate(encode_ms=-1)),
        r"doctor's keys: devices\.1\.rates\.0\.encode_ms",
    ),
    "NaN": (lambda path: doctor(path.parent, rate(encode_ms=float("nan"))), r"devices\.1\.rates\.0\.encode_ms"),
    "huge cell": (lambda path: doctor(path.parent, rate(10**9)), r"devices\.1\.rates\.0\.cell"),
    "other preset": (lambda path: doctor(path.parent, rate(preset="paper")), "no rate of gpemsr x8, preset small"),
    "other scale": (lambda path: doctor(path.parent, rate(scale=16)), "no rate of gpemsr x8"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_name_no_price(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    make(tmp_path / "doctor.json")
    with pytest.raises(UserError, match=message) as error:
        measured_device(ClusterConfig(measured=str(tmp_path / "doctor.json")), SMALL)
    assert "emsr doctor" in str(error.value)
    assert len(str(error.value)) < 700


def test_a_precision_that_was_not_measured_is_named_beside_those_that_were(tmp_path: Path) -> None:
    path = doctor(tmp_path, rate(precision="tf32"), rate(precision="bfloat16"))
    found = measured_device(ClusterConfig(measured=str(path)), SMALL)
    assert found is not None
    check_precision(found, replace(SMALL, precision="tf32"))
    wanted = r"in float32 on cuda NVIDIA X; in tf32, bfloat16 it has.* set network\.precision to tf32 or bfloat16"
    with pytest.raises(UserError, match=wanted):
        check_precision(found, SMALL)


def test_a_file_without_end_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MAX_MEASURED_BYTES", 1 << 20)
    (tmp_path / "doctor.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(UserError, match="holds more than 1 MiB"):
        measured_device(ClusterConfig(measured=str(tmp_path / "doctor.json")), SMALL)


def test_a_missing_file_is_a_mistake_of_the_dry_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lr(tmp_path / "lr.zarr", texture((4, 32, 32)))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster__measured="gone.json")
    before = tree(tmp_path)
    assert run.main([str(path), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"cluster.measured {tmp_path}/gone.json cannot be read" in said
    assert "Traceback" not in said
    assert tree(tmp_path) == before
    assert run.main([str(path)]) == 0


@pytest.mark.parametrize(("gpus", "kind"), [(None, "cuda NVIDIA X"), (1, "cuda NVIDIA X"), (0, "cpu x86_64")])
def test_the_price_is_of_the_device_that_workers_take(gpus: int | None, kind: str, tmp_path: Path) -> None:
    cluster = ClusterConfig(measured=str(doctor(tmp_path, rate(encode_ms=1))), gpus_per_worker=gpus)
    found = measured_device(cluster, SMALL)
    assert found is not None
    assert found.kind == kind


def test_workers_that_must_have_a_gpu_have_no_price_without_one(tmp_path: Path) -> None:
    path = str(doctor(tmp_path, rate(), kind="cpu arm64"))
    with pytest.raises(UserError, match=r"has no GPU, cluster\.gpus_per_worker is 1"):
        measured_device(ClusterConfig(measured=path, gpus_per_worker=1), SMALL)
