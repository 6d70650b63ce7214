"""The file server gives what a browser with Neuroglancer asks for, and nothing but the folders it was told to serve."""

from __future__ import annotations

import concurrent.futures
import gzip
import http.client
import os
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import tensorstore as ts
import zarr
from conftest import GUARD_S
from hypothesis import given
from hypothesis import strategies as st

from pipeline.base.errors import UserError
from pipeline.viewer.file_server import byte_range, serving

DATA = bytes(range(256)) * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "volume"
    (root / "sub dir").mkdir(parents=True)
    (root / "data.bin").write_bytes(DATA)
    (root / "empty").write_bytes(b"")
    (root / "sub dir" / "µ|#.txt").write_bytes(b"odd name")
    (root / "chunk.gz").write_bytes(gzip.compress(b"packed chunk"))
    (tmp_path / "secret.txt").write_bytes(b"not yours")
    (root / "leak").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "volume2").mkdir()
    (tmp_path / "volume2" / "near").write_bytes(b"a neighbour whose name begins alike")
    return root


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    with serving({"LR": folder}) as bases:
        yield bases["LR"]


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=GUARD_S)
    try:
        connection.request(method, parts.path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("bytes=0-0", DATA[:1]),
        ("bytes=10-19", DATA[10:20]),
        ("bytes=10000-", DATA[10000:]),
        ("bytes=-7", DATA[-7:]),
        ("bytes=10230-99999", DATA[10230:]),
        ("bytes=-99999", DATA),
        ("Bytes = 1-2", DATA[1:3]),
    ],
)
def test_single_ranges(url: str, header: str, wanted: bytes) -> None:
    status, headers, body = ask(f"{url}/data.bin", Range=header)
    start = DATA.rindex(wanted) if header in ("bytes=10000-", "bytes=-7", "bytes=10230-99999") else DATA.index(wanted)
    assert (status, body) == (206, wanted)
    assert headers["content-range"] == f"bytes {start}-{start + len(wanted) - 1}/{len(DATA)}"
    assert headers["content-length"] == str(len(wanted))


@pytest.mark.parametrize("header", [f"bytes={len(DATA)}-", "bytes=99999-100000", "bytes=-0"])
def test_ranges_outside_the_file_are_416(url: str, header: str) -> None:
    status, headers, body = ask(f"{url}/data.bin", Range=header)
    assert (status, headers["content-range"], body) == (416, f"bytes */{len(DATA)}", b"")


@pytest.mark.parametrize("header", ["bytes=5-4", "bytes=-", "lines=1-2", "bytes=1-2,5-6", "bytes=a-b", "nonsense"])
def test_other_range_headers_give_the_whole_file(url: str, header: str) -> None:
    status, headers, body = ask(f"{url}/data.bin", Range=header)
    assert (status, body) == (200, DATA)
    assert "content-range" not in headers


@given(size=st.integers(0, 50), first=st.none() | st.integers(0, 60), last=st.none() | st.integers(0, 60))
def test_byte_range_equals_the_definition(size: int, first: int | None, last: int | None) -> None:
    """RFC 9110, 14.1.2: the set of positions, worked out one by one."""
    header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    if first is None and last is not None:
        wanted = [i for i in range(size) if i >= size - last]
    else:
        wanted = [i for i in range(size) if i >= (first or 0) and (last is None or i <= last)]
    if (first is None and last is None) or (first is not None and last is not None and last < first):
        assert byte_range(header, size) is None
    elif not wanted:
        with pytest.raises(ValueError, match="outside the file"):
            byte_range(header, size)
    else:
        assert byte_range(header, size) == (wanted[0], wanted[-1] + 1)


def test_head_tells_the_length_and_sends_no_body(url: str) -> None:
    status, headers, body = ask(f"{url}/data.bin", "HEAD")
    assert (status, headers["content-length"], headers["accept-ranges"], body) == (200, str(len(DATA)), "bytes", b"")
    assert ask(f"{url}/nothing", "HEAD")[0] == 404
    assert ask(f"{url}/empty")[::2] == (200, b"")


def test_every_answer_is_open_to_other_origins(url: str) -> None:
    cases = [
        ("GET", "data.bin", "bytes=1-2", 206),
        ("GET", "data.bin", "bytes=99999-", 416),
        ("GET", "none", "", 404),
        ("HEAD", "data.bin", "", 200),
    ]
    for method, path, range_, status in cases:
        got, headers, _ = ask(
            f"{url}/{path}", method, Origin="https://elsewhere.example", **({"Range": range_} if range_ else {})
        )
        assert got == status
        assert headers["access-control-allow-origin"] == "*"
        assert {"Content-Range", "Content-Length"} <= set(headers["access-control-expose-headers"].split(", "))


def test_preflight(url: str) -> None:
    asked = {"Access_Control_Request_Method": "GET", "Access_Control_Request_Headers": "range"}
    status, headers, _ = ask(f"{url}/data.bin", "OPTIONS", Origin="https://e.example", **asked)
    assert status == 204
    assert headers["access-control-allow-origin"] == "*"
    assert "GET" in headers["access-control-allow-methods"]
    assert "Range" in headers["access-control-allow-headers"]


def test_nothing_but_the_files_of_the_folder(url: str, folder: Path) -> None:
    outside = [
        "../secret.txt",
        "%2e%2e/secret.txt",
        "sub dir/../../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e%2fvolume2/near",
        "../volume2/near",
        "leak",
        f"/{folder.parent}/secret.txt",
        "..\\secret.txt",
        "data.bin/",
        "data.bin/x",
        "",
        "sub%20dir",
        "sub%20dir/",
        "%00",
        "data.bin%00",
        "%ff",
        ".",
    ]
    for path in outside:
        status, _, body = raw_get(url, path)
        assert (status, body) == (404, b""), path
    base = url.rsplit("/", 2)[0]
    for other in [f"{base}/", f"{base}/LR/data.bin", f"{base}/guess/LR/data.bin", f"{url}x/data.bin", url]:
        assert ask(other)[0] == 404, other
    assert ask(f"{url}/data.bin", "POST")[0] in (405, 501)
    assert ask(f"{url}/data.bin", "PUT")[0] in (405, 501)
    assert ask(f"{url}/sub%20dir/%C2%B5%7C%23.txt")[::2] == (200, b"odd name")


def raw_get(url: str, path: str) -> tuple[int, dict[str, str], bytes]:
    """A request line with `path` as it is: clients of good manners would tidy it first."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=GUARD_S) as s:
        s.sendall(
            f"GET {parts.path}/{path.replace(' ', '%20')} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        raw = b"".join(iter(lambda: s.recv(65536), b""))
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), {}, body


def test_fifo_does_not_hang(folder: Path, url: str) -> None:
    os.mkfifo(folder / "pipe")
    assert ask(f"{url}/pipe")[0] == 404


def test_chunks_stored_with_a_suffix(url: str) -> None:
    """cloud-volume's local precomputed chunks are `name.gz`: blank in the viewer behind a plain server (issue 578)."""
    status, headers, body = ask(f"{url}/chunk", Accept_Encoding="gzip, br")
    assert (status, headers["content-encoding"], gzip.decompress(body)) == (200, "gzip", b"packed chunk")
    assert ask(f"{url}/chunk")[0] == 404
    assert gzip.decompress(ask(f"{url}/chunk.gz")[2]) == b"packed chunk"


def test_only_this_machine_and_only_as_long_as_it_lasts(folder: Path) -> None:
    before = set(threading.enumerate())
    with serving({"a b": folder}) as bases:
        parts = urlsplit(bases["a b"])
        assert parts.hostname == "127.0.0.1"
        assert parts.path.endswith("/a%20b")
        assert ask(f"{bases['a b']}/data.bin")[0] == 200
        with pytest.raises(UserError, match=rf"port {parts.port} .*--port"), serving({"x": folder}, parts.port or 0):
            pass
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{bases['a b']}/data.bin", timeout=GUARD_S)
    assert not [t for t in set(threading.enumerate()) - before if t.name == "file-server"]


def test_many_at_once(url: str) -> None:
    def one(i: int) -> bool:
        start = i * 37 % 10000
        return ask(f"{url}/data.bin", Range=f"bytes={start}-{start + 99}")[2] == DATA[start : start + 100]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(200)))


def test_sharded_zarr_by_ranges(tmp_path: Path) -> None:
    """A chunk inside a shard as Neuroglancer gets it: HEAD, the index at the shard's end, the chunk's own bytes."""
    voxels = np.random.default_rng(0).integers(0, 256, (8, 64, 96), np.uint8)
    array = zarr.create_array(
        str(tmp_path / "a"), shape=voxels.shape, dtype="u1", chunks=(4, 16, 32), shards=(8, 32, 96), compressors=None
    )
    array[:] = voxels
    with serving({"a": tmp_path / "a"}) as bases:
        shard = f"{bases['a']}/c/0/1/0"
        size = int(ask(shard, "HEAD")[1]["content-length"])
        index_bytes = 16 * (2 * 2 * 3) + 4
        status, _, index = ask(shard, Range=f"bytes={size - index_bytes}-{size - 1}")
        assert status == 206
        assert index == ask(shard, Range=f"bytes=-{index_bytes}")[2]
        offset, count = struct.unpack_from("<QQ", index, 16 * np.ravel_multi_index((1, 0, 2), (2, 2, 3)))
        chunk = ask(shard, Range=f"bytes={offset}-{offset + count - 1}")[2]
        np.testing.assert_array_equal(np.frombuffer(chunk, np.uint8).reshape(4, 16, 32), voxels[4:8, 32:48, 64:96])
        parts = urlsplit(bases["a"])
        kvstore = {"driver": "http", "base_url": f"http://{parts.netloc}", "path": parts.path + "/"}
        remote = ts.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        np.testing.assert_array_equal(remote[2:7, 10:50, 30:90].read().result(), voxels[2:7, 10:50, 30:90])
