"""Shards of sharded precomputed partition the grid; names and members are tensorstore's and cloud-volume's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore as ts
from cloudvolume.datasource.precomputed.common import compressed_morton_code
from cloudvolume.datasource.precomputed.sharding import ShardingSpecification
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.plan.target_spec import LevelSpec
from pipeline.storage.precomputed_morton import (
    MAX_PRESHIFT_BITS,
    bits_for,
    chunk_number,
    nearest_shape,
    shard_name,
    shard_shapes,
)
from pipeline.storage.targets.precomputed_shard_files import ShardFiles

grids = st.builds(ZYX, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))


def _sharding(preshift: int, minishard: int, shard: int, data: str = "raw") -> dict[str, Any]:
    return {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": "identity",
        "preshift_bits": preshift,
        "minishard_bits": minishard,
        "shard_bits": shard,
        "minishard_index_encoding": "gzip",
        "data_encoding": data,
    }


@given(grids, st.data())
def test_shards_partition_the_grid(grid: ZYX, data: st.DataObject) -> None:
    """All chunks of one box of the shard grid have one name, and no other box has that name."""
    shape = data.draw(st.sampled_from(shard_shapes(grid)))
    everything = Box(ZYX(0, 0, 0), grid)
    names = {}
    for box in grid_parts(everything, shape):
        inside = {shard_name(grid, shape, one.start) for one in grid_parts(box, ZYX(1, 1, 1))}
        assert len(inside) == 1
        names[inside.pop()] = box
    assert sum(box.size for box in names.values()) == everything.size
    numbers = [chunk_number(grid, one.start) for one in grid_parts(everything, ZYX(1, 1, 1))]
    assert len(set(numbers)) == len(numbers)


@given(grids)
def test_shapes_double_from_one_chunk_to_the_whole_grid(grid: ZYX) -> None:
    shapes = shard_shapes(grid)
    assert [shape.product for shape in shapes] == [2**p for p in range(len(shapes))]
    assert shapes[0] == ZYX(1, 1, 1)
    assert shapes[-1].minimum(grid) == grid
    for p, shape in enumerate(shapes):
        preshift, minishard, shard = bits_for(grid, shape)
        assert (preshift + minishard, preshift + minishard + shard) == (p, len(shapes) - 1)
        assert preshift <= MAX_PRESHIFT_BITS
        assert nearest_shape(grid, shape) == shape


@given(grids, st.data())
def test_names_are_those_of_cloud_volume(grid: ZYX, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(shard_shapes(grid)))
    chunk = ZYX(*(data.draw(st.integers(0, n - 1)) for n in grid))
    code = compressed_morton_code([np.array([chunk.x, chunk.y, chunk.z])], np.array([grid.x, grid.y, grid.z]))
    assert int(np.ravel(code)[0]) == chunk_number(grid, chunk)
    theirs = ShardingSpecification.from_dict(_sharding(*bits_for(grid, shape)))
    assert theirs.compute_shard_location(int(np.ravel(code)[0])).shard_number + ".shard" == shard_name(
        grid, shape, chunk
    )


@settings(max_examples=40, deadline=None)
@given(grids, st.data())
def test_shapes_and_files_are_those_of_tensorstore(grid: ZYX, data: st.DataObject) -> None:
    """tensorstore's own sharded array says the same write shape, and leaves byte-equal files (no chunk is zeros)."""
    shape = data.draw(st.sampled_from(shard_shapes(grid)))
    chunk = ZYX(1, 3, 2)
    level = LevelSpec(
        grid * chunk - ZYX(0, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 1))), chunk, shape * chunk
    )
    sharding = _sharding(*bits_for(grid, shape))
    scale = {
        "key": "k",
        "resolution": [1, 1, 1],
        "size": [level.shape.x, level.shape.y, level.shape.z],
        "voxel_offset": [0, 0, 0],
        "chunk_size": [chunk.x, chunk.y, chunk.z],
        "encoding": "raw",
        "sharding": sharding,
    }
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "memory"},
        "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 1},
        "scale_metadata": scale,
    }
    context = ts.Context()
    array = ts.open(spec, open=True, assume_metadata=True, context=context).result()
    assert ZYX.of(array[..., 0].T.chunk_layout.write_chunk_template.shape).minimum(grid * chunk) == level.shard.minimum(
        grid * chunk
    )
    voxels = np.random.default_rng(0).integers(1, 256, tuple(level.shape), dtype=np.uint8)
    array[..., 0].T.write(voxels).result()
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    theirs = {name.decode(): store.read(name).result().value for name in store.list().result()}

    whole = Box(ZYX(0, 0, 0), level.shape)
    chunks = {str(tile.start // chunk): voxels[tile.slices()].tobytes() for tile in grid_parts(whole, chunk)}
    assert ShardFiles(level, "k/", sharding, str).pack(whole, chunks) == theirs
    assert set(theirs) == {f"k/{shard_name(grid, shape, tile.start // chunk)}" for tile in grid_parts(whole, chunk)}


def test_numbers_worked_out_by_hand() -> None:
    grid = ZYX(1, 2, 4)
    assert [[chunk_number(grid, ZYX(0, y, x)) for x in range(4)] for y in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert shard_shapes(grid) == (ZYX(1, 1, 1), ZYX(1, 1, 2), ZYX(1, 2, 2), ZYX(1, 2, 4))
    assert bits_for(grid, ZYX(1, 2, 2)) == (2, 0, 1)
    # 8 x 64 x 64 chunks have numbers of 15 bits; 2^10 chunks in a shard leave 5, two hexadecimal digits.
    # x goes first, so it is x that has 16.
    large = ZYX(8, 64, 64)
    assert bits_for(large, ZYX(8, 8, 16)) == (9, 1, 5)
    assert shard_name(large, ZYX(8, 8, 16), ZYX(7, 63, 63)) == "1f.shard"
    assert shard_name(large, ZYX(8, 8, 16), ZYX(0, 0, 0)) == "00.shard"


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no shard of"):
        bits_for(ZYX(4, 4, 4), ZYX(1, 2, 4))
    with pytest.raises(ValueError, match="outside"):
        chunk_number(ZYX(2, 2, 2), ZYX(0, 2, 0))
    with pytest.raises(ValueError, match="empty"):
        shard_shapes(ZYX(0, 1, 1))
    assert nearest_shape(ZYX(4, 4, 4), ZYX(1, 2, 4)) in shard_shapes(ZYX(4, 4, 4))


def test_a_chunk_of_zeros_is_stored_and_a_chunk_that_is_not_is_found(tmp_path: Path) -> None:
    """tensorstore's sharded arrays do neither (see the module)."""
    level = LevelSpec(ZYX(1, 4, 8), ZYX(1, 2, 2), ZYX(1, 4, 4))
    files = ShardFiles(level, "k/", _sharding(2, 0, 1, "gzip"), str)
    box = Box(ZYX(0, 0, 0), ZYX(1, 4, 4))
    packed = files.pack(box, {str(tile.start // level.chunk): bytes(4) for tile in grid_parts(box, level.chunk)})
    assert list(packed) == ["k/0.shard"]
    (tmp_path / "k").mkdir()
    (tmp_path / "k/0.shard").write_bytes(packed["k/0.shard"])
    everything = [tile.start // level.chunk for tile in grid_parts(Box(ZYX(0, 0, 0), level.shape), level.chunk)]
    missing = files.lacks(tmp_path.as_uri(), everything)
    assert missing == [position for position in everything if position.x >= 2]


def test_the_nearest_shape_is_nearest_in_ratio() -> None:
    """Between 16 and 32 chunks the middle is 16 times the root of 2, 22.6."""
    grid = ZYX(1, 16, 16)
    assert [nearest_shape(grid, shape) for shape in shard_shapes(grid)] == list(shard_shapes(grid))
    assert nearest_shape(ZYX(64, 1, 1), ZYX(22, 1, 1)) == ZYX(16, 1, 1)
    assert nearest_shape(ZYX(64, 1, 1), ZYX(23, 1, 1)) == ZYX(32, 1, 1)
