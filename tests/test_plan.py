"""Laws 2 and 5: write boxes partition every level, numbers and boxes are inverse, and a plan is arithmetic."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

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
from pipeline.plan.target_spec import FIDELITY, LevelSpec
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


def by_hand(**changes: Any) -> Plan:
    """A volume of 20 x 100 x 120 with its region at (4, 40, 48) .. (12, 72, 96): 2 x 2 x 3 slabs of 4 x 16 x 16, x8."""
    shapes = [((8, 256, 384), (4, 128, 128)), ((8, 128, 192), (4, 64, 64)), ((8, 64, 96), (4, 64, 64))]
    levels = tuple(LevelSpec(ZYX.of(shape), ZYX(4, 32, 32), ZYX.of(shard)) for shape, shard in shapes)
    bounds, region = Box.of((0, 0, 0), (20, 100, 120)), Box.of((4, 40, 48), (12, 72, 96))
    piece = LevelSpec(region.shape, ZYX(4, 16, 16), ZYX(4, 16, 16))
    plan = Plan(bounds, region, ZYX(4, 16, 16), 8, Lattice(16, 8, 5, "mirror"), levels, piece)
    return replace(plan, **changes)


def test_boxes_worked_out_by_hand() -> None:
    """Cells of 16 from voxel 0 of the volume, halo 8, two sections on either side; no region cuts what is read."""
    plan = by_hand()
    assert plan.lattice.tile == 32
    assert plan.lattice.with_halo(Box.of((4, 40, 48), (8, 56, 64))) == Box.of((2, 24, 40), (10, 72, 72))
    assert (plan.grid, plan.slabs, plan.levels_by_slabs) == (ZYX(2, 2, 3), 12, 2)
    first, last = plan.slab(0), plan.slab(11)
    assert first.read == Box.of((2, 24, 40), (10, 72, 72))
    assert first.write == Box.of((0, 0, 0), (4, 128, 128))
    assert last.lr == Box.of((8, 56, 80), (12, 72, 96))
    assert last.read == Box.of((6, 40, 72), (14, 88, 104))
    assert plan.slab(3).lr.start == ZYX(8, 40, 64), "z runs fastest, then x"
    assert [plan.column_end(i) for i in (0, 1, 2, 11, 12)] == [2, 2, 4, 12, plan.tasks]
    assert plan.tasks == 14
    assert plan.pyramid_block(13).write == Box.of((4, 0, 0), (8, 64, 96))
    assert plan.box(13) == Box.of((4, 0, 0), (8, 256, 384))
    assert plan.box(11) == last.write


def test_which_levels_a_slab_writes_itself() -> None:
    """Those of which it owns whole shards. z is not halved. A slab that reaches over the region owns all of it."""
    assert by_hand().levels_by_slabs == 2
    assert by_hand(lossy=True).levels_by_slabs == 1, "other levels of a lossy target are averaged from what was stored"
    whole = by_hand(slab_shape=ZYX(9, 36, 49))
    assert (whole.slabs, whole.levels_by_slabs) == (1, 3)
    assert by_hand(slab_shape=ZYX(2, 16, 16)).levels_by_slabs == 0


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_voxel_leads_back_to_the_task_that_writes_it(plan: Plan, data: st.DataObject) -> None:
    """In every level, those of the second pass and the fidelity volume among them."""
    i = data.draw(st.integers(0, plan.tasks - 1))
    if i < plan.slabs:
        slab = plan.slab(i)
        boxes = {level: plan.level_box(slab, level) for level in range(plan.levels_by_slabs)}
        boxes[FIDELITY] = plan.fidelity_box(slab)
    else:
        boxes = {plan.pyramid_block(i).level: plan.pyramid_block(i).write}
    for level, box in boxes.items():
        for voxel in (box.start, box.stop - ZYX(1, 1, 1)):
            assert plan.task_at(level, voxel) == i


@given(plans(), st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_averaged_from_a_task_are_the_blocks_that_read_it(plan: Plan, data: st.DataObject) -> None:
    """By the blocks' own read boxes: all that share a voxel with what the task writes, and no other."""
    i = data.draw(st.integers(0, plan.tasks - 1))
    block = plan.pyramid_block(i) if i >= plan.slabs else None
    level = block.level if block else plan.levels_by_slabs - 1
    made = block.write if block else plan.level_box(plan.slab(i), level)
    blocks = [plan.pyramid_block(k) for k in range(plan.slabs, plan.tasks)]
    readers = [b.index for b in blocks if b.level == level + 1 and not b.read.intersect(made).empty]
    assert plan.averaged_from(i) == readers


def test_sections_that_are_left_empty() -> None:
    plan = by_hand(bad_sections=(3, 4, 7, 8, 11), leave_empty=True)
    assert plan.sections_left_empty(plan.slab(0)) == [0, 3]
    assert plan.sections_left_empty(plan.slab(1)) == [0, 3]
    assert by_hand(bad_sections=(4,)).sections_left_empty(plan.slab(0)) == []


def test_the_only_good_section_stands_in_for_all() -> None:
    plan = by_hand(bad_sections=tuple(range(1, 20)))
    assert {plan.section(z) for z in range(-2, 22)} == {0}
    assert by_hand(bad_sections=(12,)).section(12) == 11, "of two as near, the lower"
    with pytest.raises(ValueError, match="every section"):
        by_hand(bad_sections=tuple(range(20))).section(5)


@pytest.mark.parametrize("rows", [1, 31, 64, 513, 515])
def test_strips_are_whole_rows_of_chunks_and_of_pairs(rows: int) -> None:
    """They partition what is read, and their averages what is written: none ends between the two rows of a mean."""
    finer = LevelSpec(ZYX(3, 2061, 70), ZYX(1, rows, 64), ZYX(2, rows, 64))
    coarser = LevelSpec(ZYX(3, 1031, 35), ZYX(1, 64, 64), ZYX(2, 2048, 64))
    plan = by_hand(levels=(finer, coarser), slab_shape=ZYX(8, 32, 48), lossy=True)
    assert plan.second_pass == range(1, 2)
    for i in range(plan.slabs, plan.tasks):
        block = plan.pyramid_block(i)
        strips = plan.strips(block)
        assert sum(strip.size for strip in strips) == block.read.size
        assert sum(strip.coarser(2).size for strip in strips) == block.write.size
        for strip in strips:
            assert block.read.contains(strip)
            assert strip.start.y % rows == strip.start.y % 2 == 0


def test_a_block_reads_inside_the_level_before() -> None:
    finer = LevelSpec(ZYX(3, 61, 70), ZYX(1, 16, 16), ZYX(2, 16, 16))
    plan = by_hand(levels=(finer, LevelSpec(ZYX(3, 31, 35), ZYX(1, 16, 16), ZYX(2, 16, 16))), lossy=True)
    plan = replace(plan, slab_shape=plan.region.shape)
    last = plan.pyramid_block(plan.tasks - 1)
    assert (last.write.stop, last.read.stop) == (ZYX(3, 31, 35), ZYX(3, 61, 70))


def shapes_of(region: tuple[int, int, int], slab: ZYX | None = None, **keys: Any) -> layout.Layout:
    return layout.choose(ZYX.of(region), 8, TargetConfig(url="x", **keys), slab)


def test_shapes_worked_out_by_hand() -> None:
    """Defaults: chunks of 8 x 256 x 256, no thicker than the volume; shards that cover it, of whole chunks."""
    small = shapes_of((3, 70, 40))
    assert small.levels[0] == LevelSpec(ZYX(3, 560, 320), ZYX(3, 256, 256), ZYX(3, 768, 512))
    assert small.levels[1].shape == ZYX(3, 280, 160)
    assert small.slab_shape == ZYX(3, 96, 64)
    odd = shapes_of((3, 9, 9), chunk_shape=[3, 8, 8], mips=5)
    assert [level.shape.y for level in odd.levels] == [72, 36, 18, 9, 5]
    own = shapes_of((16, 400, 400), ZYX(8, 80, 160))
    assert own.levels[0].shard == ZYX(8, 640, 1280), "the largest shard that a given slab is made of"
    assert own.levels[0].chunk == ZYX(8, 160, 256), "and of that the largest divisor up to the default chunk"
    wide = shapes_of((8, 64, 128), chunk_shape=[2, 64, 64], shard_shape=[2, 128, 256])
    assert wide.fidelity == LevelSpec(ZYX(8, 64, 128), ZYX(2, 16, 32), ZYX(2, 16, 32))
    assert [level.shard for level in wide.levels] == [
        ZYX(2, 128, 256),
        ZYX(2, 64, 128),
        ZYX(2, 128, 256),
        ZYX(2, 64, 128),
    ], "halved while whole chunks remain, then what fits the level"


def test_how_many_levels_there_are() -> None:
    """`auto` stops where a section is two chunks across; the last level there can be is one voxel."""
    assert [len(shapes_of((8, side, side)).levels) for side in (63, 64, 65, 128, 129)] == [1, 1, 2, 2, 3]
    assert shapes_of((1, 1, 1), mips=4).levels[-1].shape == ZYX(1, 1, 1)
    with pytest.raises(TargetError, match="below one voxel"):
        shapes_of((1, 1, 1), mips=5)


def test_sharded_precomputed_takes_the_largest_shard_that_fits() -> None:
    found = shapes_of((8, 64, 64), format="precomputed", chunk_shape=[2, 64, 64], shard_shape=[4, 256, 256], mips=2)
    assert found.levels[1].shard == ZYX(4, 128, 128)


def test_a_slab_that_holds_no_whole_shards_is_refused() -> None:
    """12 LR rows are 96 SR rows: no multiple of the shard's 64, though 96 is one of 32."""
    with pytest.raises(TargetError, match="y = 12 gives 96 SR voxels per slab, but the shard's y is 64"):
        shapes_of((4, 48, 48), ZYX(4, 12, 8), chunk_shape=[4, 32, 32], shard_shape=[4, 64, 64])
    assert shapes_of((4, 48, 48), ZYX(4, 24, 8), chunk_shape=[4, 32, 32], shard_shape=[4, 64, 64])


def test_memory_worked_out_by_hand() -> None:
    """One slab of 2^20 SR voxels from 2^14 LR ones, stored at half their size."""
    box = Box.of((0, 0, 0), (4, 64, 64))
    level = LevelSpec(ZYX(4, 512, 512), ZYX(4, 256, 256), ZYX(4, 512, 512))
    plan = Plan(box, box, ZYX(4, 64, 64), 8, Lattice(64, 0, 1, "edge"), (level,), None)
    sr, lr, stored = 1 << 20, 1 << 14, 1 << 19
    computing, encoding = lr + sr, lr + sr + 3 * stored
    fixed = 7 + price.WARM_BYTES + box.size
    found = [price.memory_bytes(plan, n, 7, 0.5, price.Footprint()) - fixed for n in (1, 2, 3, 5)]
    assert found == [encoding, encoding + computing, encoding + 2 * computing, encoding + 4 * computing]
    raw = price.memory_bytes(plan, 3, 7, 1.0, price.Footprint()) - fixed
    assert raw == lr + 4 * sr + 2 * (2 * sr), "what is put, and its copy, is larger than what waits"
    flat, half = ZYX(4, 64, 256), ZYX(4, 256, 256)
    thin = replace(
        plan, slab_shape=ZYX(4, 8, 64), levels=(LevelSpec(level.shape, flat, flat), LevelSpec(half, half, half))
    )
    assert thin.pyramid_block(8).read.size == sr
    assert price.memory_bytes(thin, 3, 7, 0.5, price.Footprint()) - fixed == 3 * 2 * sr, (
        "a task of the second pass reads the whole level"
    )


def test_what_is_stored_worked_out_by_hand() -> None:
    plan = by_hand()
    sr = 8 * 256 * 384
    everything = sr + sr // 4 + sr // 16 + sr // 64
    assert price.output_voxels(plan) == everything
    assert price.output_voxels(by_hand(fidelity=None)) == sr + sr // 4 + sr // 16
    assert price.stored_share(plan, everything // 2, sr) == 0.5
    assert price.stored_share(plan, everything // 8, sr // 2) == 0.25
    assert price.stored_share(plan, 0, 0) == 1.0
