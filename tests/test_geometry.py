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
