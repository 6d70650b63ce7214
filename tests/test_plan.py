"""Laws 2 and 5: write boxes partition every level, numbers and boxes are inverse, and a plan is arithmetic."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.errors import TargetError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import TargetConfig
from pipeline.plan import price
from pipeline.plan.lattice import Lattice
from pipeline.plan.plan import Plan
from pipeline.prepare import layout


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    scale = draw(st.sampled_from([8, 16]))
    start = ZYX(*(draw(st.integers(-20, 20)) for _ in range(3)))
    bounds = Box.at(start, ZYX(draw(st.integers(1, 12)), draw(st.integers(1, 40)), draw(st.integers(1, 40))))
    low = [draw(st.integers(a, b - 1)) for a, b in zip(bounds.start, bounds.stop, strict=True)]
    high = [draw(st.integers(a + 1, b)) for a, b in zip(low, bounds.stop, strict=True)]
    region = Box.of(low, high)
    slab = ZYX(draw(st.integers(1, 5)), *(draw(st.sampled_from([4, 6, 8, 12, 16])) for _ in range(2)))
    given_shapes = {}
    if draw(st.booleans()):
        given_shapes = {"chunk_shape": [1, 16, 16], "shard_shape": [slab.z, 2 * scale, 2 * scale]}
    target = TargetConfig(url="x", format=draw(st.sampled_from(["ome-zarr", "precomputed"])), **given_shapes)
    try:
        shapes = layout.choose(region.shape, scale, target, slab)
    except TargetError:
        shapes = layout.choose(region.shape, scale, TargetConfig(url="x"), slab)
    lattice = Lattice(8 * draw(st.integers(1, 3)), 8 * draw(st.integers(0, 2)), draw(st.sampled_from([1, 5])), "mirror")
    return Plan(
        bounds, region, shapes.slab_shape, scale, lattice, shapes.levels, shapes.fidelity, lossy=draw(st.booleans())
    )


@given(plans())
@settings(max_examples=60, deadline=None)
def test_every_voxel_of_every_level_is_written_exactly_once(plan: Plan) -> None:
    counts = [np.zeros(tuple(level.shape), np.uint8) for level in plan.levels]
    fidelity = np.zeros(tuple(plan.region.shape), np.uint8)
    for i in range(plan.slabs):
        slab = plan.slab(i)
        for level in range(plan.levels_by_slabs):
            counts[level][plan.level_box(slab, level).slices()] += 1
        fidelity[plan.fidelity_box(slab).slices()] += 1
    for stage in plan.passes()[1:]:
        for i in stage:
            block = plan.pyramid_block(i)
            counts[block.level][block.write.slices()] += 1
    assert all((c == 1).all() for c in counts)
    assert (fidelity == 1).all()
    assert plan.tasks == sum(len(stage) for stage in plan.passes())


@given(plans())
@settings(max_examples=60, deadline=None)
def test_a_slab_owns_whole_shards_and_reads_inside_the_volume(plan: Plan) -> None:
    for i in range(plan.slabs):
        slab = plan.slab(i)
        assert plan.slab_at(slab.lr.start) == i == plan.slab_at(slab.lr.stop - 1)
        assert plan.bounds.contains(slab.read)
        assert slab.read.contains(slab.lr)
        for level in range(plan.levels_by_slabs):
            box, spec = plan.level_box(slab, level), plan.levels[level]
            assert box.start % spec.shard == ZYX(0, 0, 0)
            assert all(b % s == 0 or b == e for b, s, e in zip(box.stop, spec.shard, spec.shape, strict=True))


@given(plans())
@settings(max_examples=40, deadline=None)
def test_the_layout_does_not_depend_on_the_slab_when_the_shard_is_given(plan: Plan) -> None:
    shard, chunk = plan.levels[0].shard, plan.levels[0].chunk
    target = TargetConfig(url="x", chunk_shape=list(chunk), shard_shape=list(shard))
    first = layout.choose(plan.region.shape, plan.scale, target, plan.slab_shape)
    second = layout.choose(plan.region.shape, plan.scale, target, plan.slab_shape * 2)
    assert first.levels == second.levels
    assert first.fidelity == second.fidelity


@given(plans())
@settings(max_examples=40, deadline=None)
def test_input_voxels_equal_a_sum_over_slabs(plan: Plan) -> None:
    chunk = ZYX(3, 7, 5)
    read = price.input_voxels(plan, chunk)
    slabs = [plan.slab(i) for i in range(plan.slabs)]
    assert read.requested == sum(s.read.size for s in slabs)
    assert read.owned == sum(s.lr.size for s in slabs)
    origin = plan.bounds.start
    decoded = sum(
        (((s.read.stop - origin).ceil_div(chunk)) - ((s.read.start - origin) // chunk)).product * chunk.product
        for s in slabs
    )
    assert read.decoded == decoded


def test_sections_that_stand_in() -> None:
    box = Box.of((10, 0, 0), (20, 8, 8))
    plan = Plan(box, box, ZYX(2, 8, 8), 8, Lattice(8, 0, 5, "mirror"), (), None, bad_sections=(12, 13, 19))
    assert [plan.section(z) for z in (8, 9, 10, 11, 12, 13, 14, 18, 19, 20)] == [10, 10, 10, 11, 11, 14, 14, 18, 18, 18]


@pytest.mark.parametrize(
    ("keys", "slab", "words"),
    [
        ({"chunk_shape": [2, 64, 64], "shard_shape": [3, 128, 128]}, None, "shards hold whole chunks"),
        ({"chunk_shape": [2, 64, 64], "shard_shape": [2, 128, 192]}, ZYX(2, 16, 16), "slabs hold whole shards"),
        (
            {"chunk_shape": [16, 64, 64], "shard_shape": [16, 128, 128]},
            ZYX(20, 16, 16),
            "z = 20 gives 20 SR voxels per slab",
        ),
        ({"chunk_shape": [2, 60, 60], "shard_shape": [2, 60, 60]}, None, "no multiple of the scale"),
        ({"mips": 16}, None, "below one voxel"),
    ],
)
def test_shapes_that_contradict_are_refused_with_numbers_that_would_do(
    keys: dict, slab: ZYX | None, words: str
) -> None:
    with pytest.raises(TargetError, match=words):
        layout.choose(ZYX(20, 100, 100), 8, TargetConfig(url="x", **keys), slab)


_TEN_MILLION = """
import time
from pipeline.prepare import layout
from pipeline.config.volume import TargetConfig
from pipeline.base.geometry import ZYX, Box
from pipeline.plan.plan import Plan
from pipeline.plan.lattice import Lattice
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.plan.receipt import PENDING
box = Box.of((0, 0, 0), (8000, 51200, 51200))
shapes = layout.choose(box.shape, 8, TargetConfig(url="x"), None)
plan = Plan(box, box, shapes.slab_shape, 8, Lattice(64, 8, 5, "mirror"), shapes.levels, shapes.fidelity)
ledger = Ledger(Store("file://{folder}"), "d" * 64, plan.tasks, "run")
ledger.load()
first = plan.slab(next(ledger.indices(PENDING, plan.passes()[0])))
seconds = time.process_time()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(plan.slabs, seconds, peak / 1e3)
"""


def test_ten_million_slabs_plan_in_two_seconds_and_200_mb(tmp_path: object) -> None:
    """Law 5 in CPU time of all threads of a fresh process, the start of Python and imports included."""
    out = subprocess.run(
        [sys.executable, "-c", _TEN_MILLION.replace("{folder}", f"{tmp_path}/ledger")],
        capture_output=True,
        text=True,
        check=True,
    )
    slabs, seconds, megabytes = (float(v) for v in out.stdout.split())
    assert slabs == 10_000_000
    assert seconds < 2.0
    assert megabytes < 200
