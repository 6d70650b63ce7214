"""Zarr arrays as other languages' libraries write them are read voxel for voxel, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hand_zarr as hand
import imagecodecs
import numcodecs
import numpy as np
import pytest
import zarr
from hand_zarr import CHUNK, TRUTH, Encode
from source_checks import edit, opened, refusal
from source_volumes import VOXEL_NM

from pipeline.base.errors import DamagedChunkError, MissingChunkError, SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.limits import MAX_METADATA_BYTES
from pipeline.storage.sources.metadata import Folder

WIDE = TRUTH.astype("u2") * 300


def same(path: Path, voxels: np.ndarray = TRUTH, **config: Any) -> None:
    """The volume opens, and a read of all and one across chunks give its voxels."""
    if voxels.dtype == np.uint16:
        config["intensity_window"] = (0, 65535)
        voxels = (voxels.astype("i8") * 510 + 65535) // (2 * 65535)
    source = opened(path, **({"voxel_size_nm": VOXEL_NM} | config))
    np.testing.assert_array_equal(source.read(source.info.bounds), voxels)
    part = Box(ZYX(1, 3, 5), ZYX(6, 19, 18))
    np.testing.assert_array_equal(source.read(part), voxels[part.slices()])


def blosc(**settings: Any) -> Encode:
    return lambda part: bytes(numcodecs.Blosc(**settings).encode(np.ascontiguousarray(part)))


def snappy_in_blosc(part: np.ndarray) -> bytes:
    """A frame of blosc by its format: 16 bytes of header, the offset of its one block, and that block."""
    data = imagecodecs.snappy_encode(part.tobytes())
    sizes = struct.pack("<III", part.nbytes, part.nbytes, 24 + len(data))
    return bytes([2, 1, 2 << 5 | 16, 1]) + sizes + struct.pack("<II", 20, len(data)) + data


COMPRESSORS: dict[str, tuple[dict[str, Any], Encode]] = {
    "blosc of jzarr": ({"id": "blosc", "cname": "lz4", "clevel": 5, "blocksize": 0, "shuffle": 1}, blosc(cname="lz4")),
    "blosc with nthreads": ({"id": "blosc", "cname": "lz4hc", "clevel": 9, "nthreads": 4}, blosc(cname="lz4hc")),
    "blosc with typesize": ({"id": "blosc", "cname": "zstd", "shuffle": 2, "typesize": 1}, blosc(cname="zstd")),
    "blosc, shuffle as text": ({"id": "blosc", "cname": "zlib", "shuffle": "bitshuffle"}, blosc(cname="zlib")),
    "blosc, shuffle as bool": ({"id": "blosc", "cname": "zlib", "shuffle": True}, blosc(cname="zlib")),
    "blosc, shuffle -1": ({"id": "blosc", "cname": "blosclz", "clevel": 10, "shuffle": -1}, blosc(cname="blosclz")),
    "blosc with nothing": ({"id": "Blosc"}, blosc(cname="blosclz", shuffle=0)),
    "blosc with snappy": ({"id": "blosc", "cname": "snappy", "clevel": 5, "shuffle": 0}, snappy_in_blosc),
    "zlib with a text": ({"id": "zlib", "level": "6"}, lambda part: zlib.compress(part.tobytes())),
    "zlib of n5-zarr": ({"id": "zlib", "level": -1, "nthreads": 1}, lambda part: zlib.compress(part.tobytes())),
    "gzip without level": ({"id": "gzip"}, lambda part: gzip.compress(part.tobytes())),
    "gzip, level -1": ({"id": "GZip", "level": -1, "useZlib": False}, lambda part: gzip.compress(part.tobytes())),
    "bz2, level 0": ({"id": "bz2", "level": 0}, lambda part: bz2.compress(part.tobytes())),
    "bzip2": ({"id": "bzip2", "blockSize": 9}, lambda part: bz2.compress(part.tobytes())),
    "zstd with checksum": (
        {"id": "zstd", "level": 0, "checksum": True},
        lambda part: bytes(numcodecs.Zstd(checksum=True).encode(part.tobytes())),
    ),
    "zstd, level -5": ({"id": "zstd", "level": -5}, lambda part: bytes(numcodecs.Zstd(-5).encode(part.tobytes()))),
    "lz4": ({"id": "lz4", "acceleration": 1}, lambda part: bytes(numcodecs.LZ4().encode(part.tobytes()))),
    "lzma": ({"id": "lzma", "format": 1, "check": -1, "preset": 1}, lambda part: lzma.compress(part.tobytes())),
    "lzma alone": ({"id": "lzma", "format": 2}, lambda part: lzma.compress(part.tobytes(), lzma.FORMAT_ALONE)),
}


class TestZarr2:
    @pytest.mark.parametrize("name", COMPRESSORS)
    def test_compressors(self, name: str, tmp_path: Path) -> None:
        compressor, encode = COMPRESSORS[name]
        same(hand.zarr2(tmp_path / "v", encode=encode, compressor=compressor))

    @pytest.mark.parametrize("fill", [None, "NaN", -1, 256, "0", "AAAA", 0.0, float("nan"), {}, True, [1]])
    def test_fill_values_that_do_not_fit(self, fill: object, tmp_path: Path) -> None:
        same(hand.zarr2(tmp_path / "v", fill_value=fill))

    def test_keys_that_nobody_knows_and_keys_that_are_absent(self, tmp_path: Path) -> None:
        same(hand.zarr2(tmp_path / "a", axes=["z"], nested=True, attributes_={"a": 1}, filters=[]))
        left_out = ("order", "filters", "fill_value", "dimension_separator", "compressor")
        same(hand.zarr2(tmp_path / "b", drop=left_out))
        same(hand.zarr2(tmp_path / "c", order=None, dimension_separator=None, shape=[6.0, 20.0, 26.0]))
        path = hand.zarr2(tmp_path / "d")
        (path / ".zarray").write_bytes(b"\xef\xbb\xbf" + (path / ".zarray").read_bytes())
        same(path)

    @pytest.mark.parametrize("dtype", ["|u1", "<u1", ">u1", "u1", "uint8"])
    def test_spellings_of_uint8(self, dtype: str, tmp_path: Path) -> None:
        same(hand.zarr2(tmp_path / "v", dtype=dtype))

    @pytest.mark.parametrize("order", ["C", "F", "f"])
    @pytest.mark.parametrize("dtype", ["<u2", ">u2"])
    @pytest.mark.parametrize("compressor", ["none", "lz4"])
    def test_orders_of_bytes_and_axes(self, order: str, dtype: str, compressor: str, tmp_path: Path) -> None:
        voxels = WIDE.astype(dtype)[None]

        def encode(part: np.ndarray) -> bytes:
            data = part.tobytes("F" if order in "fF" else "C")
            return data if compressor == "none" else bytes(numcodecs.LZ4().encode(data))

        stated = None if compressor == "none" else {"id": "lz4"}
        same(
            hand.zarr2(tmp_path / "v", voxels, encode, "/", dimension_separator="/", order=order, compressor=stated),
            WIDE,
        )

    @pytest.mark.parametrize(
        "filters",
        [
            [numcodecs.Delta("u2")],
            [numcodecs.Delta("u2"), numcodecs.Shuffle(2)],
            [numcodecs.FixedScaleOffset(30000, 1, "u2", "i4")],
            [numcodecs.Fletcher32()],
            [numcodecs.Shuffle(2), numcodecs.Zlib(1)],
        ],
        ids=str,
    )
    def test_filters_of_zarr_python(self, filters: list[Any], tmp_path: Path) -> None:
        array = zarr.create_array(
            tmp_path / "v", shape=WIDE.shape, chunks=CHUNK, dtype="u2", zarr_format=2, filters=filters
        )
        array[...] = WIDE
        same(tmp_path / "v", WIDE)

    def test_holes_and_damage_of_what_numcodecs_decodes(self, tmp_path: Path) -> None:
        compressor, encode = COMPRESSORS["lzma"]
        path = hand.zarr2(tmp_path / "v", encode=encode, compressor=compressor)
        good = (path / "0.1.1").read_bytes()
        source = opened(path, voxel_size_nm=VOXEL_NM)
        for damaged in (good[:-9], b"", b"nonsense", lzma.compress(bytes(10)), lzma.compress(bytes(1 << 24))):
            (path / "0.1.1").write_bytes(damaged)
            with pytest.raises(DamagedChunkError, match=r"0\.1\.1"):
                source.read(source.info.bounds)
        (path / "0.1.1").unlink()
        with pytest.raises(MissingChunkError, match=r"0\.1\.1 at voxels .* is not stored"):
            source.read(source.info.bounds)
        filled = opened(path, voxel_size_nm=VOXEL_NM, missing_chunks={"fill": 9})
        want = TRUTH.copy()
        want[:4, 8:16, 8:16] = 9
        np.testing.assert_array_equal(filled.read(filled.info.bounds), want)

    def test_settings_that_numcodecs_refuses(self, tmp_path: Path) -> None:
        assert "delta" in refusal(
            hand.zarr2(tmp_path / "v", filters=[{"id": "delta", "dtype": "nonsense"}]), voxel_size_nm=VOXEL_NM
        )


class TestNamesOfChunks:
    """Where the metadata's separator is not that of the chunks, they are found, or the run is told: never a fill."""

    @pytest.mark.parametrize(("stated", "names"), [(None, "/"), (".", "/"), ("/", ".")])
    def test_found_by_the_chunks(self, stated: str | None, names: str, tmp_path: Path) -> None:
        path = hand.zarr2(tmp_path / "v", names=names, dimension_separator=stated)
        same(path)
        same(path, missing_chunks={"fill": 0})
        (note,) = opened(path, voxel_size_nm=VOXEL_NM).info.notes
        assert f'named with "{names}"' in note

    def test_found_where_the_first_chunk_is_a_hole(self, tmp_path: Path) -> None:
        path = hand.zarr2(tmp_path / "v", names="/", drop=("dimension_separator",))
        (path / "0/0/0").unlink()
        source = opened(path, voxel_size_nm=VOXEL_NM, missing_chunks={"fill": 5})
        want = TRUTH.copy()
        want[:4, :8, :8] = 5
        np.testing.assert_array_equal(source.read(source.info.bounds), want)

    def test_a_chunk_larger_than_metadata_may_be_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "0.0.0").touch()
        os.truncate(tmp_path / "0.0.0", MAX_METADATA_BYTES + 1)
        folder = Folder(f"file://{tmp_path}")
        assert folder.holds("0.0.0")
        assert not folder.holds("0/0/0")

    @pytest.mark.parametrize("config", [{}, {"missing_chunks": {"fill": 0}}])
    def test_told_at_a_hole(self, config: dict[str, Any], tmp_path: Path) -> None:
        path = hand.zarr2(tmp_path / "v")
        (path / "0.1.1").rename(tmp_path / "aside")
        (path / "0/1").mkdir(parents=True)
        (tmp_path / "aside").rename(path / "0/1/1")
        source = opened(path, voxel_size_nm=VOXEL_NM, **config)
        with pytest.raises(SourceError, match=r"0/1/1, where its metadata say 0\.1\.1"):
            source.read(source.info.bounds)
        flat = hand.zarr3(tmp_path / "w", names=".")
        with pytest.raises(SourceError, match=r"0\.0\.0, where its metadata say c/0/0/0"):
            opened(flat, voxel_size_nm=VOXEL_NM, **config).read(Box(ZYX(0, 0, 0), ZYX(4, 8, 8)))


def named(name: str, **configuration: Any) -> dict[str, Any]:
    return {"name": name} | ({"configuration": configuration} if configuration else {})


BYTES = named("bytes", endian="little")
CRC = named("crc32c")


def sharded(*chunk: int, codecs: Sequence[Any] = (BYTES,), **more: Any) -> dict[str, Any]:
    return named("sharding_indexed", chunk_shape=chunk, codecs=codecs, index_codecs=[BYTES], **more)


def shard(part: np.ndarray, start: bool = False) -> bytes:
    """A shard of inner chunks of 2 x 8 x 8, without a checksum of its index."""
    parts = [part[z : z + 2].tobytes() for z in (0, 2)]
    first = 32 if start else 0
    index = struct.pack("<QQQQ", first, len(parts[0]), first + len(parts[0]), len(parts[1]))
    return index + b"".join(parts) if start else b"".join(parts) + index


CODECS: dict[str, tuple[list[Any], Encode]] = {
    "bytes as text": (["bytes"], bytes),
    "no codec": ([], bytes),
    "endian of zarrita": ([named("endian", endian="little")], bytes),
    "bytes of null": ([{"name": "bytes", "configuration": None}], bytes),
    "blosc without typesize": ([BYTES, named("blosc", cname="lz4", clevel=5, shuffle="shuffle")], blosc(cname="lz4")),
    "blosc of numbers": ([BYTES, named("blosc", cname="zstd", clevel=10, shuffle=2, nthreads=3)], blosc(cname="zstd")),
    "numcodecs.blosc": ([BYTES, named("numcodecs.blosc", cname="zstd", shuffle=1)], blosc(cname="zstd")),
    "zstd without checksum": (
        [BYTES, named("zstd", level=-3)],
        lambda part: bytes(numcodecs.Zstd().encode(part.tobytes())),
    ),
    "zstd alone": ([named("zstd")], lambda part: bytes(numcodecs.Zstd().encode(part.tobytes()))),
    "numcodecs.zstd": ([BYTES, named("numcodecs.zstd")], lambda part: bytes(numcodecs.Zstd().encode(part.tobytes()))),
    "gzip, level -1": ([BYTES, named("gzip", level=-1)], lambda part: gzip.compress(part.tobytes())),
    "numcodecs.zlib": ([BYTES, named("numcodecs.zlib", level=1)], lambda part: zlib.compress(part.tobytes())),
    "numcodecs.lz4": ([BYTES, named("numcodecs.lz4")], lambda part: bytes(numcodecs.LZ4().encode(part.tobytes()))),
    "transpose C": ([named("transpose", order="C"), BYTES], bytes),
    "transpose F": ([named("transpose", order="F"), BYTES], lambda part: part.tobytes("F")),
    "transpose": ([named("transpose", order=[1, 2, 0]), BYTES], lambda part: part.transpose(1, 2, 0).tobytes()),
    "transposes and lz4": (
        [named("transpose", order=[1, 2, 0]), named("transpose", order=[1, 0, 2]), BYTES, named("numcodecs.lz4")],
        lambda part: bytes(numcodecs.LZ4().encode(part.transpose(1, 2, 0).transpose(1, 0, 2).tobytes())),
    ),
    "shard, index at start": ([sharded(2, 8, 8, index_location="start")], lambda part: shard(part, start=True)),
    "shard, plain names": ([sharded(2, 8, 8, codecs=["bytes"])], shard),
    "shard in another order": (
        [named("transpose", order=[1, 2, 0]), sharded(8, 8, 2, codecs=[named("transpose", order=[2, 0, 1]), BYTES])],
        shard,
    ),
}


class TestZarr3:
    @pytest.mark.parametrize("name", CODECS)
    def test_codecs(self, name: str, tmp_path: Path) -> None:
        codecs, encode = CODECS[name]
        same(hand.zarr3(tmp_path / "v", encode=encode, codecs=codecs))

    def test_nested_shards(self, tmp_path: Path) -> None:
        inner = sharded(2, 8, 8)
        outer = sharded(*CHUNK, codecs=[inner])
        path = hand.zarr3(tmp_path / "v", encode=shard, codecs=[inner])
        grid = {"name": "regular", "configuration": {"chunk_shape": [8, 8, 8]}}
        edit(path / "zarr.json", lambda v: v | {"codecs": [outer], "chunk_grid": grid})
        for y, x in np.ndindex(3, 4):
            parts = [(path / f"c/{z}/{y}/{x}").read_bytes() for z in (0, 1)]
            index = struct.pack("<QQQQ", 0, len(parts[0]), len(parts[0]), len(parts[1]))
            (path / f"c/0/{y}/{x}").write_bytes(b"".join(parts) + index)
            (path / f"c/1/{y}/{x}").unlink()
        same(path)

    @pytest.mark.parametrize(
        ("names", "encoding"),
        [
            ("c/", {"name": "default"}),
            ("c/", "default"),
            ("c.", named("default", separator=".")),
            (".", {"name": "v2"}),
            ("/", named("v2", separator="/")),
        ],
    )
    def test_names_of_chunks(self, names: str, encoding: Any, tmp_path: Path) -> None:
        same(hand.zarr3(tmp_path / "v", names=names, chunk_key_encoding=encoding))

    def test_other_spellings(self, tmp_path: Path) -> None:
        for n, keys in enumerate(
            [
                {"data_type": {"name": "uint8"}},
                {"data_type": {"name": "uint8", "configuration": {}}, "storage_transformers": []},
                {"fill_value": "0x00"},
                {"fill_value": None},
                {"fill_value": "NaN"},
                {"fill_value": [0]},
                {"dimension_names": None},
                {"dimension_names": [None, "y", None]},
                {"dimension_names": [None, None, None], "comment": "by hand"},
                {"consolidated_metadata": None},
                {"extra": {"name": "extra", "must_understand": False}},
            ]
        ):
            same(hand.zarr3(tmp_path / str(n), **keys))
        same(hand.zarr3(tmp_path / "a", drop=("fill_value", "attributes", "chunk_key_encoding")))
        same(
            hand.zarr3(tmp_path / "b", WIDE.astype(">u2"), codecs=[named("bytes", endian="big")], data_type="uint16"),
            WIDE,
        )

    def test_refused_by_name(self, tmp_path: Path) -> None:
        packed = named("sharding_indexed", chunk_shape=[2, 8, 8], codecs=[BYTES], index_codecs=[BYTES, named("gzip")])
        for n, (keys, word) in enumerate(
            [
                ({"extra": {"name": "extra"}}, "extra"),
                ({"storage_transformers": [{"name": "t"}]}, "storage_transformers"),
                ({"codecs": [BYTES, named("vlen-utf8")]}, "vlen-utf8"),
                ({"codecs": [sharded(2, 8, 8), named("zstd")]}, "no codec after sharding_indexed"),
                ({"codecs": [sharded(3, 8, 8)]}, "chunks that divide the shard"),
                ({"codecs": [packed]}, "bytes and crc32c for the index"),
                ({"codecs": [BYTES, BYTES]}, "one codec that turns voxels into bytes"),
                ({"codecs": [named("transpose", order=[0, 0, 1]), BYTES]}, "each axis once"),
                ({"chunk_key_encoding": named("default", separator="-")}, "separator"),
                ({"chunk_key_encoding": named("suffix", suffix=".bin")}, "suffix"),
                ({"data_type": {"name": "numpy.datetime64", "configuration": {}}}, "numpy.datetime64"),
            ]
        ):
            assert word in refusal(hand.zarr3(tmp_path / str(n), **keys), voxel_size_nm=VOXEL_NM)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("codec", ["LZ4", "LZMA", "Zlib", "BZ2", "Zstd", "Blosc", "GZip", "CRC32C", "Adler32"])
    def test_numcodecs_by_zarr_python(self, codec: str, tmp_path: Path) -> None:
        from zarr.codecs import numcodecs as foreign

        array = zarr.create_array(
            tmp_path / "v", shape=WIDE.shape, chunks=CHUNK, dtype="u2", compressors=[getattr(foreign, codec)()]
        )
        array[...] = WIDE
        same(tmp_path / "v", WIDE)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_filters_by_zarr_python(self, tmp_path: Path) -> None:
        from zarr.codecs import numcodecs as foreign

        filters = [foreign.Delta(dtype="<u2")]
        zarr.create_array(tmp_path / "v", shape=WIDE.shape, chunks=CHUNK, dtype="u2", filters=filters)[...] = WIDE
        same(tmp_path / "v", WIDE)

    @pytest.mark.parametrize("version", [2, 3])
    def test_defaults_of_zarr_python(self, version: Any, tmp_path: Path) -> None:
        zarr.create_array(tmp_path / "v", data=TRUTH, chunks=CHUNK, zarr_format=version)
        same(tmp_path / "v")


def test_nothing_that_runs_code_is_decoded(tmp_path: Path) -> None:
    """numcodecs has a codec of pickles, which run what a volume says."""
    make: Callable[..., Path]
    for make, keys in (
        (hand.zarr2, {"filters": [{"id": "pickle"}]}),
        (hand.zarr3, {"codecs": [BYTES, named("numcodecs.pickle")]}),
    ):
        assert "pickle" in refusal(make(tmp_path / make.__name__, **keys), voxel_size_nm=VOXEL_NM)
