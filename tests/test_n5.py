"""N5 as other languages' libraries and other labs' tools write it: read, or refused with a way that works."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import struct
import threading
import zlib
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import imagecodecs
import numcodecs
import numpy as np
import pytest
from source_checks import opened, refusal
from source_volumes import truth

from pipeline.base.errors import DamagedChunkError, SourceError
from pipeline.config.volume import FillConfig, SourceConfig
from pipeline.storage.sources.open import open_source

SHAPE, BLOCK = (6, 20, 26), (4, 8, 8)
NM = {"pixelResolution": {"unit": "nm", "dimensions": [4, 8, 40]}}
RAW = {"type": "raw"}


def write(
    path: Path,
    compression: Any = RAW,
    encode: Callable[[bytes], bytes] = bytes,
    voxels: np.ndarray | None = None,
    head: Callable[[tuple[int, ...]], bytes] | None = None,
    **attributes: Any,
) -> Path:
    """An array by hand, from the specification: x first, blocks with big-endian heads, cut off at the array's end."""
    stored = (truth(SHAPE) if voxels is None else voxels).T
    block = BLOCK[::-1] + (1,) * (stored.ndim - 3)
    path.mkdir(parents=True)
    known = {"dimensions": list(stored.shape), "blockSize": list(block), "dataType": "uint8"}
    (path / "attributes.json").write_text(json.dumps(known | {"compression": compression} | attributes))
    for at in itertools.product(*(range(-(-n // b)) for n, b in zip(stored.shape, block, strict=True))):
        part = stored[tuple(slice(i * b, (i + 1) * b) for i, b in zip(at, block, strict=True))]
        file = path.joinpath(*map(str, at))
        file.parent.mkdir(parents=True, exist_ok=True)
        begin = struct.pack(f">HH{part.ndim}I", 0, part.ndim, *part.shape) if head is None else head(part.shape)
        file.write_bytes(begin + encode(part.tobytes("F")))
    return path


def attributes_of(path: Path, **values: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "attributes.json").write_text(json.dumps(values))


def assert_read(path: Path, **config: Any) -> None:
    source = opened(path, **config)
    np.testing.assert_array_equal(source.read(source.info.bounds), truth(SHAPE))


def _blosc(name: str) -> Callable[[bytes], bytes]:
    return numcodecs.Blosc(name, 6, 2).encode


def java_lz4(data: bytes, size: int) -> bytes:
    """lz4-java's LZ4BlockOutputStream with buffers of `size` bytes: what does not get smaller is stored as it is."""
    out = b""
    for at in range(0, len(data), size):
        part = data[at : at + size]
        packed = imagecodecs.lz4_encode(part)
        method, body = (0x20, packed) if len(packed) < len(part) else (0x10, part)
        out += b"LZ4Block" + struct.pack("<BIII", method, len(body), len(part), 0) + body
    return out + b"LZ4Block" + struct.pack("<BIII", 0x10, 0, 0, 0)


COMPRESSIONS: dict[str, tuple[Any, Callable[[bytes], bytes]]] = {
    "java-blosc": (
        {"type": "blosc", "cname": "zstd", "clevel": 6, "shuffle": 2, "blocksize": 0, "nthreads": 1},
        _blosc("zstd"),
    ),
    "blosc-lz4hc": ({"type": "blosc", "cname": "lz4hc", "clevel": 9, "shuffle": -1}, _blosc("lz4hc")),
    "blosc-without-members": ({"type": "blosc"}, _blosc("lz4")),
    "java-gzip": ({"type": "gzip", "level": -1, "useZlib": False}, gzip.compress),
    "java-zlib": ({"type": "gzip", "level": -1, "useZlib": True}, zlib.compress),
    "rust-gzip": ({"type": "gzip", "level": 6, "useZlib": None}, gzip.compress),
    "gzip-of-another-level": ({"type": "gzip", "level": 12, "strategy": "default"}, gzip.compress),
    "java-bzip2": ({"type": "bzip2", "blockSize": 8}, bz2.compress),
    "zarr-xz": ({"type": "xz", "preset": None, "format": 1, "check": -1, "filters": None}, lzma.compress),
    "java-xz": ({"type": "xz", "preset": 6}, lzma.compress),
    "java-zstd": ({"type": "zstd", "level": 3, "nbWorkers": 0}, numcodecs.Zstd(3).encode),
    "java-lz4": ({"type": "lz4", "blockSize": 65536}, lambda b: java_lz4(b, 100)),
    "lz4-frames": ({"type": "lz4", "blockSize": 65536}, imagecodecs.lz4f_encode),
    "raw": ({"type": "raw"}, bytes),
    "as-text": ("gzip", gzip.compress),
    "upper-case": ({"type": "GZIP"}, gzip.compress),
}


class TestCompression:
    @pytest.mark.parametrize("name", COMPRESSIONS)
    def test_as_writers_state_it(self, name: str, tmp_path: Path) -> None:
        compression, encode = COMPRESSIONS[name]
        assert_read(write(tmp_path / "v", compression, encode, **NM))

    def test_of_before_n5_2(self, tmp_path: Path) -> None:
        write(tmp_path / "v", None, gzip.compress, compressionType="gzip", dataType="UINT8", **NM)
        assert_read(tmp_path / "v")

    def test_keys_of_others_decide_nothing(self, tmp_path: Path) -> None:
        """Neither those that tensorstore does not know nor those that it would take otherwise."""
        more = {"n5": "4.0.0", "units": ["px", "px", "px"], "axes": None, "labels": {"a": 1}, "resolution": [9, 9, 9]}
        assert_read(write(tmp_path / "v", **NM, **more), voxel_size_nm=(40.0, 8.0, 4.0))

    @pytest.mark.parametrize("kind", ["lz4hc", "jpeg", "lzma", "", 7])
    def test_others_are_refused_by_name(self, kind: Any, tmp_path: Path) -> None:
        message = refusal(write(tmp_path / "v", {"type": kind}, **NM))
        assert f"type = {json.dumps(kind)}" in message

    def test_zlib_that_is_stated_as_gzip_is_damage(self, tmp_path: Path) -> None:
        source = opened(write(tmp_path / "v", {"type": "gzip"}, zlib.compress, **NM))
        with pytest.raises(DamagedChunkError):
            source.read(source.info.bounds)


class TestLz4:
    """emsr decodes these blocks itself."""

    def test_two_bytes_a_channel_of_one_and_axes_turned(self, tmp_path: Path) -> None:
        voxels = truth(SHAPE, "uint16").transpose(2, 1, 0)[None]
        big = voxels.astype(">u2")
        path = write(
            tmp_path / "v",
            {"type": "lz4"},
            lambda b: java_lz4(b, 300),
            voxels=big,
            dataType="uint16",
            axes=["z", "y", "x", "c"],
            resolution=[40, 8, 4, 1],
        )
        source = opened(path, intensity_window=(0, 65535))
        assert source.info.voxel_size_nm == (40, 8, 4)
        np.testing.assert_array_equal(
            source.read(source.info.bounds), (truth(SHAPE, "uint16").astype(int) * 510 + 65535) // (2 * 65535)
        )

    def test_blocks_that_are_whole_at_the_end(self, tmp_path: Path) -> None:
        """Some writers pad the last block of an axis."""
        path = write(tmp_path / "v", {"type": "lz4"}, lambda b: java_lz4(b, 300), **NM)
        part = np.zeros(BLOCK, np.uint8)
        part[:2, :4, :2] = truth(SHAPE)[4:, 16:, 24:]
        (path / "3/2/1").write_bytes(struct.pack(">HH3I", 0, 3, *BLOCK[::-1]) + java_lz4(part.T.tobytes("F"), 99))
        assert_read(path)

    @pytest.mark.parametrize(
        "block",
        [
            b"",
            struct.pack(">HH3I", 0, 3, 8, 8, 4),
            struct.pack(">HH3I", 0, 3, 8, 8, 4) + java_lz4(bytes(255), 100),
            struct.pack(">HH3I", 0, 3, 8, 8, 4) + java_lz4(bytes(257), 1000),
            struct.pack(">HH3I", 0, 3, 8, 8, 4) + java_lz4(bytes(256), 100)[:40],
            struct.pack(">HH3I", 0, 3, 8, 8, 3) + java_lz4(bytes(192), 100),
            struct.pack(">HH3I", 0, 3, 8000, 8000, 4) + java_lz4(bytes(192), 100),
            struct.pack(">HH4I", 1, 3, 8, 8, 4, 256) + java_lz4(bytes(256), 100),
            struct.pack(">HH3I", 0, 3, 8, 8, 4) + b"LZ4Block" + b"\xff" * 30,
            struct.pack(">HH3I", 0, 3, 8, 8, 4) + b"nothing of that kind",
            struct.pack(">HH3I", 0, 3, 8, 8, 4) + bytes(imagecodecs.lz4f_encode(bytes(1 << 20))),
        ],
    )
    def test_what_is_no_such_block_is_damage(self, block: bytes, tmp_path: Path) -> None:
        path = write(tmp_path / "v", {"type": "lz4"}, lambda b: java_lz4(b, 300), **NM)
        (path / "0/0/0").write_bytes(block)
        source = opened(path, missing_chunks=FillConfig(fill=9))
        with pytest.raises(DamagedChunkError):
            source.read(source.info.bounds)
        (path / "0/0/0").unlink()
        assert (source.read(source.info.bounds)[:4, :8, :8] == 9).all()


class TestBlocks:
    def test_other_modes_are_named(self, tmp_path: Path) -> None:
        """Mode 1 has varying lengths, mode 2 an object; neither is a hole, nor voxels."""
        for mode, head in (
            (1, lambda shape: struct.pack(">HHIIII", 1, 3, *shape, int(np.prod(shape)))),
            (2, lambda shape: struct.pack(">HI", 2, int(np.prod(shape)))),
        ):
            path = write(tmp_path / str(mode), head=head, **NM)
            source = opened(path, missing_chunks=FillConfig(fill=9))
            with pytest.raises(DamagedChunkError, match=f"0/0/0 is an N5 block of mode {mode}"):
                source.read(source.info.bounds)

    def test_a_large_block_that_ends_in_zeros(self, tmp_path: Path) -> None:
        """Its head is looked at, however large the block is."""
        voxels = np.zeros((5, 1900, 1900), np.uint8)
        voxels[:, :-1, :-1] = 7
        path = tmp_path / "v"
        attributes_of(path, dimensions=[1900, 1900, 5], blockSize=[1900, 1900, 5], dataType="uint8", compression=RAW)
        (path / "0/0").mkdir(parents=True)
        (path / "0/0/0").write_bytes(struct.pack(">HH3I", 0, 3, 1900, 1900, 5) + voxels.tobytes())
        source = opened(path, voxel_size_nm=(40, 4, 4))
        np.testing.assert_array_equal(source.read(source.info.bounds), voxels)

    def test_a_channel_of_one(self, tmp_path: Path) -> None:
        for name, more in (("plain", {}), ("named", {"axes": ["x", "y", "z", "c"]}), ("text", {"axes": "xyzc"})):
            sizes = {"pixelResolution": {"unit": "nm", "dimensions": [4, 8, 40]}}
            path = write(tmp_path / name, voxels=truth(SHAPE)[None], **sizes, **more)
            assert_read(path)
            assert opened(path).info.voxel_size_nm == (40, 8, 4)


class TestPlaces:
    """Sizes in nm (z, y, x) and the corner of voxel 0, as tools state them."""

    @pytest.mark.parametrize(
        ("own", "group", "size", "corner"),
        [
            ({"resolution": [4, 8, 40], "units": "nm", "offset": [400, 800, -40]}, {}, (40, 8, 4), (-40, 800, 400)),
            ({}, {"resolution": [4, 8, 40], "offset": [400, 800, -40]}, (40, 16, 8), (-40, 800, 400)),
            (
                {"resolution": [0.004, 0.008, 0.04], "units": ["um"] * 3, "offset": [0.4, 0, 0]},
                {},
                (40, 8, 4),
                (0, 0, 400),
            ),
            ({"pixelResolution": {"unit": "µm", "dimensions": [0.004, 0.008, 0.04]}}, {}, (40, 8, 4), (0, 0, 0)),
            (
                {
                    "transform": {
                        "axes": ["z", "y", "x"],
                        "units": ["nm"] * 3,
                        "scale": [40, 8, 4],
                        "translate": [0, 4, 2],
                    }
                },
                {},
                (40, 8, 4),
                (-20, 0, 0),
            ),
            (
                {"transform": {"ordering": "F", "axes": ["x", "y", "z"], "scale": [4, 8, 40], "translate": [2, 4, 60]}},
                {"resolution": [1, 1, 1]},
                (40, 8, 4),
                (40, 0, 0),
            ),
            (
                {},
                {
                    "multiscales": [
                        {
                            "name": "cellmap",
                            "datasets": [
                                {"path": "s0", "transform": {"axes": ["z", "y", "x"], "scale": [40, 4, 2]}},
                                {
                                    "path": "s1",
                                    "transform": {
                                        "axes": ["z", "y", "x"],
                                        "scale": [40, 8, 4],
                                        "translate": [20, 4, 2],
                                        "units": ["nm"] * 3,
                                    },
                                },
                            ],
                        }
                    ]
                },
                (40, 8, 4),
                (0, 0, 0),
            ),
            (
                {},
                {
                    "multiscales": [
                        {
                            "version": "0.4",
                            "axes": [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"],
                            "datasets": [
                                {
                                    "path": "s1",
                                    "coordinateTransformations": [
                                        {"type": "scale", "scale": [0.04, 0.008, 0.004]},
                                        {"type": "translation", "translation": [0.02, 0.104, 0.002]},
                                    ],
                                }
                            ],
                        }
                    ]
                },
                (40, 8, 4),
                (0, 100, 0),
            ),
            ({}, {"multiscales": [], "resolution": [4, 8, 40]}, (40, 16, 8), (0, 0, 0)),
            ({}, {"downsamplingFactors": [[1, 1, 1], [2, 2, 1]], "resolution": [4, 8, 40]}, (40, 16, 8), (0, 0, 0)),
        ],
    )
    def test_dialects(
        self, own: dict[str, Any], group: dict[str, Any], size: tuple[Any, ...], corner: tuple[Any, ...], tmp_path: Path
    ) -> None:
        factors = {} if own or "downsamplingFactors" in group else {"downsamplingFactors": [2, 2, 1]}
        write(tmp_path / "v/s0")
        write(tmp_path / "v/s1", **(own or factors))
        attributes_of(tmp_path / "v", **group)
        info = opened(tmp_path / "v", mip=1).info
        assert info.voxel_size_nm == pytest.approx(size)
        assert info.corner_nm == pytest.approx(corner)

    def test_a_size_without_a_unit_that_cannot_be_nm(self, tmp_path: Path) -> None:
        path = write(tmp_path / "v", resolution=[0.004, 0.004, 0.04])
        assert "Give source.voxel_size_nm" in refusal(path)
        assert opened(path, voxel_size_nm=(40.0, 4.0, 4.0)).info.voxel_size_nm == (40, 4, 4)

    def test_a_position_that_cannot_be_taken_is_said(self, tmp_path: Path) -> None:
        size = (40.0, 8.0, 4.0)
        (note,) = opened(write(tmp_path / "v", offset=[0, 0, 9]), voxel_size_nm=size).info.notes
        assert "offset = [0, 0, 9] is not taken" in note
        assert opened(write(tmp_path / "u", offset=[0, 0, 0]), voxel_size_nm=size).info.notes == ()
        assert opened(write(tmp_path / "w", offset=[0, 0, 9], **NM)).info.notes == ()

    def test_axes_that_a_transform_states_in_another_order(self, tmp_path: Path) -> None:
        """Written from NumPy's x, y, z: N5 then stores z first."""
        transform = {"axes": ["x", "y", "z"], "units": ["nm"] * 3, "scale": [4, 8, 40], "translate": [2, 4, 20]}
        path = write(tmp_path / "v", voxels=truth(SHAPE).T, transform=transform)
        assert_read(path)
        assert opened(path).info.voxel_size_nm == (40, 8, 4)

    def test_groups_above_an_array_are_asked_the_nearest_first(self, tmp_path: Path) -> None:
        attributes_of(tmp_path / "v", resolution=[1, 1, 1], n5="2.5.1")
        attributes_of(tmp_path / "v/c0", resolution=[4, 8, 40], scales=[[1, 1, 1], [2, 2, 1]])
        for level in (0, 1):
            write(tmp_path / f"v/c0/s{level}")
        assert opened(tmp_path / "v", array="c0/s1").info.voxel_size_nm == (40, 16, 8)

    @pytest.mark.parametrize("wrong", [{"resolution": [4, 8]}, {"resolution": [4, 8, "x"]}, {"axes": [1, 2, 3]}])
    def test_what_is_malformed_is_named(self, wrong: dict[str, Any], tmp_path: Path) -> None:
        assert next(iter(wrong)) in refusal(write(tmp_path / "v", **wrong))


class TestWhatIsInside:
    def bigdataviewer(self, path: Path) -> Path:
        attributes_of(path, n5="2.5.1")
        attributes_of(path / "setup0", dataType="uint8", downsamplingFactors=[[1, 1, 1], [2, 2, 1]])
        attributes_of(path / "setup0/timepoint0", resolution=[4, 8, 40], multiScale=True, saved_completed=True)
        for level in (0, 1):
            write(path / f"setup0/timepoint0/s{level}", downsamplingFactors=[1 + level, 1 + level, 1])
        return path

    def test_bigdataviewer_by_what_its_messages_say(self, tmp_path: Path) -> None:
        path = self.bigdataviewer(tmp_path / "v")
        for place, append in (("", "setup0/timepoint0"), ("setup0", "timepoint0")):
            message = refusal(path / place)
            assert f"Append {append} to source.url" in message
            assert f"source.array: {append}/s0" in message
            assert_read(path / place / append)
            for spelling in ("{}", "/{}", "{}/", "/{}/"):
                assert_read(path / place, array=spelling.format(f"{append}/s0"))
        assert opened(path / "setup0/timepoint0", mip=1).info.voxel_size_nm == (40, 16, 8)

    def test_a_group_that_source_array_names(self, tmp_path: Path) -> None:
        path = self.bigdataviewer(tmp_path / "v")
        message = refusal(path, array="setup0")
        assert "that is a group" in message
        assert "source.array: setup0/timepoint0/s0" in message
        assert "setup0/timepoint0" in refusal(path, array="raw")

    def test_arrays_of_a_group_without_levels_are_named(self, tmp_path: Path) -> None:
        for name in ("raw", "volumes/labels"):
            write(tmp_path / "v" / name, **NM)
        message = refusal(tmp_path / "v")
        assert "raw, volumes/labels" in message
        assert_read(tmp_path / "v", array="raw")
        assert_read(tmp_path / "v/raw")

    def test_paintera(self, tmp_path: Path) -> None:
        attributes_of(tmp_path / "v", n5="2.5.1")
        attributes_of(tmp_path / "v/raw", painteraData={"type": "raw"})
        attributes_of(tmp_path / "v/raw/data", multiScale=True, resolution=[4, 8, 40], offset=[0, 0, 80])
        write(tmp_path / "v/raw/data/s0", {"type": "gzip", "level": -1}, gzip.compress)
        assert "Append raw/data to source.url" in refusal(tmp_path / "v")
        assert "Append data to source.url" in refusal(tmp_path / "v/raw")
        assert_read(tmp_path / "v/raw/data")
        assert opened(tmp_path / "v/raw/data").info.corner_nm == (80, 0, 0)

    def test_behind_a_server_the_usual_places_are_looked_at(self, tmp_path: Path) -> None:
        """No folder can be listed there."""
        self.bigdataviewer(tmp_path / "v")
        handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/v"
            with pytest.raises(SourceError, match=r"Append setup0/timepoint0 to source\.url"):
                open_source(SourceConfig(url=url))
            with pytest.raises(SourceError, match=r"Append timepoint0 to source\.url"):
                open_source(SourceConfig(url=f"{url}/setup0"))
            server.shutdown()

    def test_a_folder_without_any(self, tmp_path: Path) -> None:
        (tmp_path / "v/notes").mkdir(parents=True)
        assert "no volume is at source.url" in refusal(tmp_path / "v")
