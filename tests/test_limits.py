"""No file or server fills the memory of a machine: what is too large is told in a line, and little of it is read."""

from __future__ import annotations

import gzip
import http.server
import json
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_volumes as written
from conftest import REPOSITORY, texture, volume_yaml, write_lr

from models.metadata import WeightsError, read_metadata
from pipeline.base import limits
from pipeline.base.errors import ConfigError, DamagedChunkError, SourceError, TooLargeObjectError, UserError
from pipeline.config import volume
from pipeline.config.volume import FillConfig, SourceConfig
from pipeline.prepare.prepare import prepare
from pipeline.storage.conversion.ome_zarr_stack import write_stack
from pipeline.storage.conversion.section_files import open_stack
from pipeline.storage.kv import Store
from pipeline.storage.sources.open import open_source
from pipeline.storage.sources.unpacked_size import exceeds

YAML = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{n}: &{n} [{', '.join(['*' + o] * 10)}]\n" for o, n in zip("abcdefgh", "bcdefghi", strict=True)),
    "itself": "a: &a [*a, *a]\n",
    "deep list": "a: " + "[" * 100_000,
    "deep mapping": "".join(f"{' ' * i}a:\n" for i in range(2_000)),
    "long list": f"a: [{'1, ' * 200_000}1]\n",
    "large": "# \n" * 2_000_000,
}


@pytest.mark.parametrize("name", YAML)
def test_a_yaml_bomb(name: str, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text(YAML[name])
    with pytest.raises(ConfigError, match=r"nested too deeply|more than|not YAML") as caught:
        volume.load(tmp_path / "v.yaml")
    assert len(str(caught.value)) < 500


def test_many_mistakes_are_told_in_few_lines(tmp_path: Path) -> None:
    keys = "".join(f"  k{i}: 1\n" for i in range(5_000))
    (tmp_path / "v.yaml").write_text(
        f"source:\n  url: a\n{keys}target: {{url: b}}\nnetwork: {{name: bicubic, scale: 8}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        volume.load(tmp_path / "v.yaml")
    assert caught.value.problems[-1] == f"... and {5_000 - limits.MAX_PROBLEMS:,} more"
    assert len(caught.value.problems) == limits.MAX_PROBLEMS + 1


@pytest.mark.parametrize("key", ["zarr.json", "info", "attributes.json", ".zarray"])
def test_large_metadata(key: str, tmp_path: Path) -> None:
    """A hole of 300 MB, of which nothing is read."""
    with (tmp_path / key).open("wb") as file:
        file.truncate(300_000_000)
    with pytest.raises(SourceError, match="holds more than 16 MiB"):
        open_source(SourceConfig(url=str(tmp_path)))


def test_metadata_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text('{"a":' * 1_000_000)
    with pytest.raises(SourceError, match="not JSON"):
        open_source(SourceConfig(url=str(tmp_path)))


@contextmanager
def serving(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(limits.MAX_METADATA_BYTES >> 15):  # twice the bound, for a test that ends
        handler.wfile.write(b" " * (1 << 16))


def zipped(handler: http.server.BaseHTTPRequestHandler) -> None:
    body = gzip.compress(bytes(limits.MAX_METADATA_BYTES * 2), 1)
    handler.send_response(200)
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.parametrize("answer", [endless, zipped])
def test_a_server_that_sends_too_much(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> None:
    with serving(answer) as url, pytest.raises(SourceError, match="holds more than 16 MiB"):
        open_source(SourceConfig(url=url))


@pytest.mark.parametrize("zip_it", [False, True])
def test_what_a_server_sends_is_what_was_asked_for(zip_it: bool) -> None:
    """Whole, decompressed; an object that is not there is None, at the bound and beyond it."""
    seen = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        seen.append(handler.path)
        body = gzip.compress(b"x" * 1000) if zip_it else b"x" * 1000
        there = handler.path.endswith("/a%20b")
        handler.send_response(200 if there else 404)
        if zip_it and there:
            handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", str(len(body) if there else 0))
        handler.end_headers()
        handler.wfile.write(body if there else b"")

    with serving(answer) as url:
        store = Store(url)
        assert store.get_at_most("a b", 1000) == b"x" * 1000
        assert len(seen) == 1
        assert store.get_at_most("absent", 1000) is None
        with pytest.raises(TooLargeObjectError):
            store.get_at_most("a b", 999)


def zarr3(folder: Path, shape: Any, chunk: Any = (4, 16, 16), **changes: Any) -> None:
    body = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0,
        "codecs": [{"name": "bytes"}],
        "attributes": {},
    }
    folder.mkdir(exist_ok=True)
    (folder / "zarr.json").write_text(json.dumps(body | changes))


@pytest.mark.parametrize(
    "shape", [[2**63, 8, 8], [2**64, 8, 8], [0, 8, 8], [-1, 8, 8], [1e300, 8, 8], [2**62, 2**62, 2**62], [2**45] * 3]
)
def test_absurd_shapes(shape: list[Any], tmp_path: Path) -> None:
    """Refused as metadata, or as more tasks than a client can count."""
    zarr3(tmp_path / "lr.zarr", shape)
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__voxel_size_nm=[45, 32, 32])
    with pytest.raises(UserError):
        prepare(volume.load(path))


def test_more_tasks_than_are_counted(tmp_path: Path) -> None:
    zarr3(tmp_path / "lr.zarr", [2**30, 2**14, 2**14])
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__voxel_size_nm=[45, 32, 32])
    with pytest.raises(SourceError, match=f"at most {limits.MAX_TASKS:,}"):
        prepare(volume.load(path))


def test_more_sections_than_detection_looks_at(tmp_path: Path) -> None:
    zarr3(tmp_path / "lr.zarr", [10**9, 8, 8])
    path = volume_yaml(
        tmp_path / "v.yaml",
        "lr.zarr",
        "sr",
        source__voxel_size_nm=[45, 32, 32],
        source__bad_sections={"detect": True},
        work__slab_shape=[40, 32, 32],
    )
    with pytest.raises(SourceError, match="would look at 1,000,000,000 sections"):
        prepare(volume.load(path), lambda survey, source: pytest.fail("looked"))


def test_more_bad_sections_than_are_recorded(tmp_path: Path) -> None:
    zarr3(tmp_path / "lr.zarr", [10**6, 8, 8])
    path = volume_yaml(
        tmp_path / "v.yaml",
        "lr.zarr",
        "sr",
        source__voxel_size_nm=[45, 32, 32],
        source__bad_sections={"list": list(range(limits.MAX_BAD_SECTIONS + 1))},
    )
    with pytest.raises(SourceError, match="10,001 sections are bad"):
        prepare(volume.load(path))


def test_indices_of_shards_are_bounded(tmp_path: Path) -> None:
    """A shard's index is read whole: where memory for it is lacking, tensorstore ends the process."""
    inner = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [1, 1, 1], "codecs": [{"name": "bytes"}], "index_codecs": [{"name": "bytes"}]},
    }
    zarr3(tmp_path / "z", [4, 2**14, 2**14], [4, 2**14, 2**14], codecs=[inner])
    with pytest.raises(SourceError, match="chunks in a shard"):
        open_source(SourceConfig(url=str(tmp_path / "z"), voxel_size_nm=(45.0, 4.0, 4.0)))
    scale = {
        "key": "s",
        "size": [64, 64, 8],
        "encoding": "raw",
        "chunk_sizes": [[64, 64, 8]],
        "resolution": [4, 4, 45],
        "sharding": {
            "@type": "neuroglancer_uint64_sharded_v1",
            "preshift_bits": 0,
            "hash": "identity",
            "minishard_bits": 31,
            "shard_bits": 0,
        },
    }
    (tmp_path / "p").mkdir()
    info = {"type": "image", "data_type": "uint8", "num_channels": 1, "scales": [scale]}
    (tmp_path / "p" / "info").write_text(json.dumps(info))
    with pytest.raises(SourceError, match="minishard_bits"):
        open_source(SourceConfig(url=str(tmp_path / "p")))


def test_a_chunk_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    """cloud-volume would unpack it in memory; it is damaged, and never a hole."""
    chunks = written.by_cloud_volume(tmp_path / "v")
    (chunks.path / chunks.chunk).write_bytes(gzip.compress(bytes(64 << 20), 1))
    source = open_source(SourceConfig(url=str(chunks.path), missing_chunks=FillConfig(fill=9)))
    with pytest.raises(DamagedChunkError, match="unpacks to more than"):
        source.read(source.info.bounds)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zstd", ".br"])
def test_what_a_file_unpacks_to(suffix: str, tmp_path: Path) -> None:
    import bz2
    import lzma

    import brotli
    import zstandard

    pack = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zstd": zstandard.ZstdCompressor().compress,
        ".br": brotli.compress,
    }[suffix]
    path = tmp_path / f"chunk{suffix}"
    path.write_bytes(pack(bytes(1_000_000)))
    assert not exceeds(path, 1_000_000)
    assert exceeds(path, 999_999)


def png(path: Path, height: int, width: int) -> Path:
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    )
    return path


def test_an_image_larger_than_memory_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    png(tmp_path / "s" / "0.png", 2**31 - 1, 2**31 - 1)
    with pytest.raises(SourceError, match="this machine has"):
        write_stack(open_stack(tmp_path / "s"), f"file://{tmp_path}/t.zarr", (45.0, 4.0, 4.0))
    assert not (tmp_path / "t.zarr").exists()


def test_tiff_strips_that_unpack_to_more_than_their_section(tmp_path: Path) -> None:
    """In a process of its own, whose memory does not grow: decoders are given the section's size."""
    import imagecodecs
    import tifffile

    for strip in ("zlib", "lzw", "zstd", "lzma"):
        path = tmp_path / f"{strip}.tif"
        tifffile.imwrite(path, np.zeros((16, 16), np.uint8), compression=strip, photometric="minisblack")
        payload = getattr(imagecodecs, f"{strip}_encode")(bytes(128 << 20))
        with tifffile.TiffFile(path) as tif:
            tags = [tif.pages[0].tags[name] for name in ("StripOffsets", "StripByteCounts")]
            places = [(tag.offset, tag.valueoffset) for tag in tags]
        data = bytearray(path.read_bytes())
        for (tag, value), number in zip(places, (len(data), len(payload)), strict=True):
            struct.pack_into("<H", data, tag + 2, 4)
            struct.pack_into("<I", data, value, number)
        path.write_bytes(bytes(data) + payload)
    program = """
import resource, sys
from pipeline.base.errors import SourceError
from pipeline.storage.conversion.section_files import open_stack
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        assert open_stack(path).read(0).shape == (16, 16)
    except SourceError:
        pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", program, *map(str, sorted(tmp_path.glob("*.tif")))]
    grown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120).stdout
    assert int(grown) < 64 << 10


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", limits.MAX_WEIGHTS_BYTES),
        struct.pack("<Q", 40) + b"[" * 40,
        struct.pack("<Q", 500_000) + b'{"a":' * 100_000,
        struct.pack("<Q", 24) + b'{"__metadata__": [1, 2]}',
    ],
)
def test_heads_of_weights(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(8 << 30)
    with pytest.raises(WeightsError, match="no safetensors file"):
        read_metadata(path)


def test_a_source_that_was_good_stays_good(tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", texture((4, 32, 32)))
    assert prepare(volume.load(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr"))).job.plan.slabs == 1
