"""Laws of boxes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.geometry import ZYX, Box, grid_parts

ints = st.integers(-50, 50)
zyx = st.builds(ZYX, ints, ints, ints)
sizes = st.builds(ZYX, *[st.integers(1, 12)] * 3)
boxes = st.builds(Box.at, zyx, st.builds(ZYX, *[st.integers(0, 30)] * 3))


@given(boxes, boxes)
def test_intersection_is_contained_in_both_and_commutes_in_size(a: Box, b: Box) -> None:
    both = a.intersect(b)
    assert a.contains(both)
    assert b.contains(both)
    assert both.size == b.intersect(a).size


@given(boxes, st.integers(1, 16))
def test_finer_then_coarser_is_the_same_box(box: Box, factor: int) -> None:
    assert box.lateral(factor).coarser(factor) == box
    assert box.lateral(factor).size == box.size * factor**2


@given(boxes, sizes)
def test_tiles_partition_the_box(box: Box, shape: ZYX) -> None:
    parts = list(grid_parts(box, shape))
    assert sum(p.size for p in parts) == box.size
    for i, part in enumerate(parts):
        assert box.contains(part)
        assert part.start // shape == (part.stop - 1) // shape
        assert all(part.intersect(other).empty for other in parts[i + 1 : i + 20])


@given(boxes, zyx)
def test_slices_are_relative_to_an_origin(box: Box, origin: ZYX) -> None:
    assert tuple(s.stop - s.start for s in box.slices(origin)) == tuple(box.shape)
    assert box.shift(ZYX(0, 0, 0) - origin).slices() == box.slices(origin)


@given(boxes, st.integers(1, 16))
def test_coarser_is_the_smallest_box_that_covers(box: Box, factor: int) -> None:
    """Rounded outwards at both ends, by less than one coarse voxel; z is kept."""
    covers = box.coarser(factor).lateral(factor)
    assert (covers.start.z, covers.stop.z) == (box.start.z, box.stop.z)
    for axis in ("y", "x"):
        assert 0 <= getattr(box.start, axis) - getattr(covers.start, axis) < factor
        assert 0 <= getattr(covers.stop, axis) - getattr(box.stop, axis) < factor


def test_boxes_worked_out_by_hand() -> None:
    assert Box.of((1, -5, 3), (2, 9, 8)).coarser(4) == Box.of((1, -2, 0), (2, 3, 2))
    assert Box.of((3, 0, 0), (1, 4, 5)).shape == ZYX(0, 4, 5)
    assert Box.of((1, 2, 3), (4, 5, 6)).grow(ZYX(1, 2, 3)) == Box.of((0, 0, 0), (5, 7, 9))
    far, near = Box.of((-9, 9, 9), (-9, 10, 10)), Box.of((0, 0, 0), (2, 2, 2))
    assert near.contains(far), "an empty box is contained wherever it lies"
    assert near.intersect(Box.of((5, 0, 0), (6, 2, 2))) == Box.of((5, 0, 0), (5, 2, 2))


def test_tiles_come_in_z_y_x_order() -> None:
    starts = [tile.start for tile in grid_parts(Box.of((0, 1, 2), (3, 4, 6)), ZYX(2, 2, 3))]
    assert starts == sorted(starts)
    assert starts[1] == ZYX(0, 1, 3), "x runs fastest"
