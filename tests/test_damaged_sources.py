"""Nothing is invented in silence: a missing, cut, garbled or empty chunk is an error in every format.

So is any fault in the metadata.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_volumes as written
import tensorstore as ts
from source_volumes import CHUNK, FORMATS, SHAPE, SHARD, VOXEL_NM, Written

from pipeline.base.errors import DamagedChunkError, EmsrError, MissingChunkError, SourceError, TransientError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import FillConfig, MaskConfig, SourceConfig
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.volume import Source, VolumeInfo

FILL = 7  # in no volume's truth
_numbers = itertools.count()


def seen_anew(volume: Written, tmp_path: Path, **config: Any) -> Source:
    """The volume under a path that no cache of this process has seen."""
    alias = tmp_path / f"alias{next(_numbers)}"
    alias.symlink_to(volume.path)
    if not volume.has_voxel_size:
        config.setdefault("voxel_size_nm", VOXEL_NM)
    return open_source(SourceConfig(url=str(alias), **config))


@pytest.fixture(scope="module", params=FORMATS)
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return FORMATS[request.param](tmp_path_factory.mktemp("kept") / request.param)


@pytest.fixture
def volume(kept: Written) -> Iterator[Written]:
    """A volume whose first chunk (or shard) is put back after the test."""
    file = kept.path / kept.chunk
    before = file.read_bytes()
    yield kept
    file.write_bytes(before)


def chunk_box(volume: Written) -> Box:
    return Box.at(ZYX.of(volume.start), ZYX.of(CHUNK[::-1] if "xyz" in volume.path.name else CHUNK))


class TestChunks:
    def test_missing(self, volume: Written, tmp_path: Path) -> None:
        (volume.path / volume.chunk).unlink()
        source = seen_anew(volume, tmp_path)
        for box in (chunk_box(volume), source.info.bounds):
            with pytest.raises(MissingChunkError, match="missing_chunks"):
                source.read(box)

    def test_missing_with_a_stated_fill(self, volume: Written, tmp_path: Path) -> None:
        whole = seen_anew(volume, tmp_path).read(Box.at(ZYX.of(volume.start), ZYX.of(SHAPE)))
        (volume.path / volume.chunk).unlink()
        source = seen_anew(volume, tmp_path, missing_chunks=FillConfig(fill=FILL))
        holes = source.read(source.info.bounds)
        absent = holes == FILL
        np.testing.assert_array_equal(holes[~absent], whole[~absent])
        if "sharded" not in volume.path.name:
            want = np.zeros(SHAPE, bool)
            want[chunk_box(volume).slices(ZYX.of(volume.start))] = True
        elif volume.format == "zarr3":
            want = np.zeros(SHAPE, bool)
            want[: SHARD[0], : SHARD[1], : SHARD[2]] = True
        else:
            assert absent[: CHUNK[0], : CHUNK[1], : CHUNK[2]].all()
            want = absent
            assert not absent.all()
        np.testing.assert_array_equal(absent, want)
        part = Box.at(ZYX.of(volume.start) + 3, ZYX(9, 20, 20))
        np.testing.assert_array_equal(source.read(part), holes[part.slices(ZYX.of(volume.start))])

    @pytest.mark.parametrize("damage", ["half", "header", "one byte", "garbage", "other length", "empty"])
    @pytest.mark.parametrize("missing", ["error", FillConfig(fill=FILL)], ids=["error", "fill"])
    def test_damaged(self, volume: Written, tmp_path: Path, damage: str, missing: Any) -> None:
        file = volume.path / volume.chunk
        good = file.read_bytes()
        noise = random.Random(1).randbytes(len(good) + 11)
        damaged = {
            "half": good[: len(good) // 2],
            "header": good[:3],
            "one byte": good[:1],
            "garbage": noise[:-11],
            "other length": noise,
            "empty": b"",
        }
        file.write_bytes(damaged[damage])
        source = seen_anew(volume, tmp_path, missing_chunks=missing)
        if damage == "garbage" and volume.path.name in (
            "zarr2-raw",
            "zarr3-raw",
            "precomputed-raw",
            "cloud-volume-plain",
        ):
            # any bytes of the right number are voxels where nothing is encoded: these formats carry no checksum
            assert source.read(chunk_box(volume)).shape == CHUNK
            return
        for box in (chunk_box(volume), source.info.bounds):
            with pytest.raises(DamagedChunkError):
                source.read(box)

    @pytest.mark.parametrize(
        "name", ["NOT_FOUND: is missing", "404 not found [os_error_code='2']", "Permission denied"]
    )
    def test_a_cut_chunk_below_any_name_is_no_hole(self, volume: Written, tmp_path: Path, name: str) -> None:
        """Errors quote the path, which says nothing of what happened."""
        file = volume.path / volume.chunk
        file.write_bytes(file.read_bytes()[:11])
        (tmp_path / name).mkdir()
        source = seen_anew(volume, tmp_path / name, missing_chunks=FillConfig(fill=FILL))
        with pytest.raises(DamagedChunkError):
            source.read(source.info.bounds)

    def test_cut_anywhere(self, volume: Written, tmp_path: Path) -> None:
        """However a chunk is cut, it is an error, or (only a checksum was cut off) every voxel is as it was."""
        box = chunk_box(volume)
        whole = seen_anew(volume, tmp_path).read(box)
        file = volume.path / volume.chunk
        good = file.read_bytes()
        errors = 0
        for length in sorted(
            {*range(1, len(good), max(1, len(good) // 20)), len(good) - 2, len(good) - 1, len(good) - 9, len(good) - 17}
        ):
            file.write_bytes(good[:length])
            try:
                got = seen_anew(volume, tmp_path, missing_chunks=FillConfig(fill=FILL)).read(box)
            except DamagedChunkError:
                errors += 1
            else:
                np.testing.assert_array_equal(got, whole)
        assert errors >= 5

    def test_other_chunks_can_still_be_read(self, volume: Written, tmp_path: Path) -> None:
        whole = seen_anew(volume, tmp_path).read(Box.at(ZYX.of(volume.start), ZYX.of(SHAPE)))
        (volume.path / volume.chunk).write_bytes(b"")
        last = Box.at(ZYX.of(volume.start) + ZYX.of(SHAPE) - 3, ZYX(3, 3, 3))
        np.testing.assert_array_equal(seen_anew(volume, tmp_path).read(last), whole[-3:, -3:, -3:])


class TestShortN5Blocks:
    """N5 lets a block say that it is smaller than the grid's; what it lacks must not become zeros."""

    @pytest.mark.parametrize("sizes", [(8, 16, 8), (16, 16, 4), (1, 1, 1), (16, 15, 8)])
    @pytest.mark.parametrize("group", [False, True])
    def test_is_damaged(self, sizes: tuple[int, int, int], group: bool, tmp_path: Path) -> None:
        volume = written.n5(tmp_path / "v", "raw")
        block = volume.path / "0/0/0"
        block.write_bytes(struct.pack(">HHIII", 0, 3, *sizes) + bytes([9]) * int(np.prod(sizes)))
        if group:
            (tmp_path / "g").mkdir()
            shutil.move(volume.path, tmp_path / "g" / "s0")
            volume = Written(tmp_path / "g", volume.voxels, volume.start, "s0/0/0/0", (), "n5")
        source = seen_anew(volume, tmp_path, missing_chunks=FillConfig(fill=FILL))
        for box in (chunk_box(volume), source.info.bounds, Box.of((6, 14, 14), (8, 16, 16))):
            with pytest.raises(DamagedChunkError, match=r"0/0/0 holds"):
                source.read(box)
        assert source.read(Box.of((8, 0, 0), SHAPE)).any()

    def test_short_blocks_at_the_end_and_real_zeros_are_fine(self, tmp_path: Path) -> None:
        voxels = written.truth()
        voxels[:, :, 20:] = 0
        volume = written.n5(tmp_path / "v", "raw", voxels=voxels)
        # x: 50 = 3 * 16 + 2; z: 20 = 2 * 8 + 4; what other writers store there is the part inside the volume
        (volume.path / "3/0/2").write_bytes(struct.pack(">HHIII", 0, 3, 2, 16, 4) + bytes(2 * 16 * 4))
        source = seen_anew(volume, tmp_path)
        np.testing.assert_array_equal(source.read(source.info.bounds), voxels)


class TestMoments:
    def test_a_vanished_volume_is_no_hole(self, tmp_path: Path) -> None:
        for name in (
            "zarr2-blosc",
            "zarr3-sharded-blosc",
            "ome-0.4",
            "ome-0.5",
            "n5-group",
            "precomputed-raw",
            "cloud-volume-raw-gz",
        ):
            volume = FORMATS[name](tmp_path / name)
            config = {} if volume.has_voxel_size else {"voxel_size_nm": VOXEL_NM}
            source = open_source(SourceConfig(url=str(volume.path), missing_chunks=FillConfig(fill=FILL), **config))
            volume.path.rename(tmp_path / f"{name}-unmounted")
            with pytest.raises(TransientError, match="has gone"):
                source.read(source.info.bounds)
            (tmp_path / f"{name}-unmounted").rename(volume.path)

    def test_an_empty_file_among_suffixed_ones_is_damaged(self, tmp_path: Path) -> None:
        volume = written.by_cloud_volume(tmp_path / "v")
        chunk = volume.path / volume.chunk
        chunk.rename(chunk.with_suffix(""))
        chunk.with_suffix("").write_bytes(b"")
        with pytest.raises(DamagedChunkError, match="has no bytes"):
            seen_anew(volume, tmp_path, missing_chunks=FillConfig(fill=FILL)).read(chunk_box(volume))

    def test_mask_holes(self, tmp_path: Path) -> None:
        volume = written.n5(tmp_path / "v")
        (volume.path / volume.chunk).unlink()
        like = VolumeInfo(
            "file:///em", "n5", Box.of((0, 0, 0), SHAPE), VOXEL_NM, (0.0, 0.0, 0.0), "uint8", ZYX.of(CHUNK), "0" * 64
        )
        mask = open_mask(MaskConfig(url=str(volume.path)), like)
        with pytest.raises(MissingChunkError, match=r"source\.mask\.missing_chunks"):
            mask.read(chunk_box(volume))
        filled = open_mask(MaskConfig(url=str(volume.path), missing_chunks=FillConfig(fill=0)), like)
        assert not filled.read(chunk_box(volume)).any()
        assert filled.read(Box.of((8, 16, 16), SHAPE)).all()


FUZZED = [
    "zarr2-blosc",
    "zarr3-sharded-blosc",
    "ome-0.4",
    "ome-0.5-cxyz",
    "n5-blosc",
    "n5-group",
    "precomputed-jpeg",
    "precomputed-sharded-raw",
    "cloud-volume-raw-gz",
    "cloud-volume-jxl",
]
WRONG: list[Any] = [None, "", "x", 0, -1, 3, 1.5, 2**31, 2**45, 10**30, 1e300, True, [], {}, [1], ["x"], [None]]
WRONG += [{"a": 1}, [[1, 2, 3]], [{}], [0, 0, 0], [-1, -1, -1]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


def mutations(document: Any) -> Iterator[tuple[str, Any]]:
    for path in places(document):
        for wrong in [KeyError, *WRONG]:
            changed = copy.deepcopy(document)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if wrong is KeyError:
                del holder[path[-1]]
            else:
                holder[path[-1]] = wrong
            yield f"{path} = {'deleted' if wrong is KeyError else wrong!r}", changed


def survives(open_it: Callable[[], Source], what: str) -> bool:
    """Whether it opened. Nothing but our own errors may escape, and what is read has the shape asked for."""
    try:
        source = open_it()
    except UserError as error:
        message = str(error)
        assert "\n" not in message, what
        assert len(message) < 1500, what
        assert "Traceback" not in message, what
        return False
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} {error}") from error
    bounds = source.info.bounds
    box = Box(bounds.start, (bounds.start + 4).minimum(bounds.stop))
    try:
        assert source.read(box).shape == tuple(box.shape), what
    except EmsrError:
        pass
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} {error}") from error
    return True


@pytest.mark.parametrize("name", FUZZED)
def test_any_key_of_the_metadata_deleted_or_wrong(name: str, tmp_path: Path) -> None:
    volume = FORMATS[name](tmp_path / name)
    refused = 0
    for document in volume.metadata:
        file = volume.path / document
        good = file.read_text()
        for what, changed in mutations(json.loads(good)):
            file.write_text(json.dumps(changed))
            refused += not survives(
                lambda: seen_anew(volume, tmp_path, missing_chunks=FillConfig(fill=FILL)), f"{document} {what}"
            )
        file.write_text(good)
    assert refused > 50


@pytest.mark.parametrize("name", FUZZED)
def test_half_written_metadata(name: str, tmp_path: Path) -> None:
    volume = FORMATS[name](tmp_path / name)
    for document in volume.metadata:
        file = volume.path / document
        good = file.read_bytes()
        wrong = [good[: len(good) * n // 9] for n in range(9)]
        wrong += [
            b"\xff\xfe\x00",
            b"[]",
            b"null",
            b"7",
            b'"x"',
            b"[" * 100_000,
            b"<html></html>",
            b"\0" * len(good),
        ]
        for content in wrong:
            file.write_bytes(content)
            with pytest.raises(SourceError) as caught:
                seen_anew(volume, tmp_path)
            assert document.split("/")[-1] in str(caught.value), content[:20]
        file.write_bytes(good)


@pytest.mark.parametrize("bits", [(0, 0, 5), (1, 1, 2), (1, 1, 3), (2, 1, 1), (4, 0, 0), (3, 2, 0)])
@pytest.mark.parametrize("hashed", ["identity", "murmurhash3_x86_128"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_holes_of_sharded_precomputed_are_found_wherever_they_are(
    bits: tuple[int, int, int], hashed: str, encoding: str, tmp_path: Path
) -> None:
    """Chunks absent from a shard, whole shards absent, and black chunks that are there: tensorstore reads zeros."""
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1",
        "hash": hashed,
        "minishard_index_encoding": encoding,
        "data_encoding": encoding,
    }
    sharding |= dict(zip(("preshift_bits", "minishard_bits", "shard_bits"), bits, strict=True))
    scale = {
        "key": "s",
        "size": [64, 64, 32],
        "resolution": [4, 4, 40],
        "chunk_size": [32, 32, 8],
        "encoding": "raw",
        "sharding": sharding,
    }
    info = {"@type": "neuroglancer_multiscale_volume", "type": "image", "data_type": "uint8", "num_channels": 1}
    scale = scale | {"chunk_sizes": [scale.pop("chunk_size")], "voxel_offset": [0, 0, 0]}
    (tmp_path / "info").write_text(json.dumps(info | {"scales": [scale]}))
    store = ts.KvStore.open(
        {
            "driver": "neuroglancer_uint64_sharded",
            "base": {"driver": "file", "path": f"{tmp_path}/s/"},
            "metadata": sharding,
        }
    ).result()
    grey, black = bytes([7]) * 8192, bytes(8192)
    with ts.Transaction() as transaction:
        for number, value in ((0, grey), (1, black), (6, grey)):
            store.with_transaction(transaction).write(struct.pack(">Q", number), value).result()
    source = open_source(SourceConfig(url=str(tmp_path)))
    chunks = {
        number: Box.at(ZYX(8 * (number // 4), 32 * (number // 2 % 2), 32 * (number % 2)), ZYX(8, 32, 32))
        for number in range(8)
    }
    assert (source.read(chunks[0]) == 7).all()
    assert (source.read(chunks[1]) == 0).all()
    assert (source.read(chunks[6]) == 7).all()
    for number in (2, 3, 4, 5, 7):
        with pytest.raises(MissingChunkError, match=r"source\.missing_chunks"):
            source.read(chunks[number])
    filled = open_source(SourceConfig(url=str(tmp_path), missing_chunks=FillConfig(fill=9))).read(
        Box.of((0, 0, 0), (16, 64, 64))
    )
    assert [int(filled[c.slices()].max()) for c in chunks.values()] == [7, 0, 9, 9, 9, 9, 7, 9]
