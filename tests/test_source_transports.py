"""The same volume through S3, GCS and HTTP, all on this machine; moments of the network told apart from damage."""

from __future__ import annotations

import lzma
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import boto3
import hand_zarr
import numpy as np
import pytest
import source_volumes as written
from source_volumes import FORMATS, VOXEL_NM, truth

from pipeline.base.errors import DamagedChunkError, MissingChunkError, SourceError, TransientError
from pipeline.config.volume import FillConfig, SourceConfig
from pipeline.storage.sources.open import open_source
from pipeline.storage.volume import Source

CARRIED = [
    "zarr2-blosc",
    "zarr3-sharded-blosc",
    "ome-0.4",
    "ome-0.5",
    "n5-group",
    "precomputed-raw",
    "precomputed-jpeg",
    "precomputed-sharded-raw",
    "cloud-volume-jxl",
    "cloud-volume-sharded-jxl",
]


def opened(url: str, name: str = "", fill: int | None = None) -> Source:
    size = VOXEL_NM if name.startswith("zarr") else None
    return open_source(
        SourceConfig(url=url, voxel_size_nm=size, missing_chunks="error" if fill is None else FillConfig(fill=fill))
    )


def check(source: Source) -> None:
    got = source.read(source.info.bounds)
    assert np.abs(got.astype(int) - truth()).max() <= (6 if "jpeg" in source.info.url else 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One volume of each carried format, by its name."""
    root = tmp_path_factory.mktemp("carried")
    for name in CARRIED:
        FORMATS[name](root / name)
    return root


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True
    root: Path
    ranges = True
    status: int | None = None
    """Answer this to every request but for metadata."""
    absent = 404
    flaky = 0
    """Answer 503 to so many requests first."""
    body: bytes | None = None
    """Answer with this instead of a chunk."""
    cut = False
    """Close in the middle of each chunk."""

    def __init__(self, root: Path, key_of: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.key_of = root, key_of
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    """GET with Range for plain HTTP; the media requests of Google's JSON interface where server.key_of is `gcs`."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, path = self.server, urlsplit(self.path).path
        if server.key_of == "gcs":
            _, sep, key = path.partition("/o/")
            file = server.root / unquote(key) if sep else Path("/nonexistent")
        else:
            file = server.root / unquote(path).lstrip("/")
        chunk = file.name not in ("info", "attributes.json", "zarr.json", ".zarray", ".zattrs", ".zgroup")
        if server.flaky > 0:
            server.flaky -= 1
            return self._answer(503, b"")
        if not file.is_file():
            return self._answer(server.absent, b"")
        if chunk and server.status:
            return self._answer(server.status, b"")
        return self._answer(
            200, server.body if chunk and server.body is not None else file.read_bytes(), cut=chunk and server.cut
        )

    def _answer(self, status: int, body: bytes, cut: bool = False) -> None:
        span = self.headers.get("Range") if self.server.ranges and status == 200 else None
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(body) - int(last))
            stop = int(last) + 1 if first and last else len(body)
            if start >= len(body):
                status, body = 416, b""
            else:
                status, total, body = 206, len(body), body[start:stop]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture
def http(folder: Path) -> Iterator[tuple[_Server, str]]:
    server = _Server(folder, "http")
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def s3() -> Iterator[object]:
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="volumes")
    yield client
    server.stop()
    patch.undo()


def upload(client: object, folder: Path, prefix: str, **extra: str) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            client.put_object(
                Bucket="volumes", Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes(), **extra
            )  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CARRIED)
def test_http(name: str, http: tuple[_Server, str]) -> None:
    check(opened(f"{http[1]}/{name}", name))


@pytest.mark.parametrize("name", CARRIED)
def test_s3(name: str, s3: object, folder: Path) -> None:
    upload(s3, folder / name, name)
    check(opened(f"s3://volumes/{name}", name))
    with pytest.raises(SourceError, match="no volume is at"):
        opened(f"s3://volumes/{name}-absent", name)


def test_gcs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the environment variables by which tensorstore itself is tested; no request leaves this machine."""
    server = _Server(folder, "gcs")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GCE_METADATA_ROOT", f"127.0.0.1:{server.server_port}")
    for name in CARRIED:
        check(opened(f"gs://volumes/{name}", name))
    with pytest.raises(SourceError, match="no volume is at"):
        opened("gs://volumes/absent")
    server.shutdown()


@pytest.mark.parametrize(("compress", "header"), [("gzip", "gzip"), ("br", "br")])
@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_s3_objects_with_content_encoding(
    compress: str, header: str, encoding: str, s3: object, tmp_path: Path
) -> None:
    """How cloud-volume stores compressed chunks in object stores: plain names, and a header undone on the way."""
    volume = written.by_cloud_volume(tmp_path / "v", encoding, compress)
    for file in volume.path.rglob("*.*"):
        if file.suffix in (".gz", ".br"):
            file.rename(file.with_suffix(""))
    scale = volume.path / volume.chunk.split("/")[0]
    prefix = f"{encoding}-{compress}-encoded"
    upload(s3, volume.path, prefix)
    upload(s3, scale, f"{prefix}/{scale.name}", ContentEncoding=header)
    source = opened(f"s3://volumes/{prefix}")
    got = source.read(source.info.bounds)
    assert np.abs(got.astype(int) - truth()).max() <= volume.tolerance
    # the same object cut short, still saying that it is compressed
    name = f"{prefix}/{volume.chunk.removesuffix('.gz').removesuffix('.br')}"
    body = s3.get_object(Bucket="volumes", Key=name)["Body"].read()  # type: ignore[attr-defined]
    upload(s3, volume.path, f"{prefix}-cut")
    upload(s3, scale, f"{prefix}-cut/{scale.name}", ContentEncoding=header)
    s3.put_object(
        Bucket="volumes", Key=name.replace(prefix, f"{prefix}-cut"), Body=body[: len(body) // 2], ContentEncoding=header
    )  # type: ignore[attr-defined]
    source = opened(f"s3://volumes/{prefix}-cut", fill=7)
    with pytest.raises((DamagedChunkError, TransientError)):
        source.read(source.info.bounds)


def test_suffixed_files_behind_a_server_are_refused_even_with_a_fill(http: tuple[_Server, str], folder: Path) -> None:
    written.by_cloud_volume(folder / "suffixed", "raw", "gzip")
    for fill in (None, 0):
        source = opened(f"{http[1]}/suffixed", fill=fill)
        with pytest.raises(SourceError, match=r"names ending in \.gz"):
            source.read(source.info.bounds)


def test_missing_behind_a_server(http: tuple[_Server, str], folder: Path) -> None:
    volume = written.precomputed(folder / "holed")
    (volume.path / volume.chunk).unlink()
    source = opened(f"{http[1]}/holed")
    with pytest.raises(MissingChunkError):
        source.read(source.info.bounds)
    holes = opened(f"{http[1]}/holed", fill=7).read(source.info.bounds)
    assert (holes == 7).sum() == np.prod(written.CHUNK)


def test_a_page_instead_of_a_chunk(http: tuple[_Server, str]) -> None:
    server, url = http
    server.body = b"<html>Please log in</html>"
    for name in ("zarr2-blosc", "n5-group", "precomputed-raw", "precomputed-jpeg"):
        source = opened(f"{url}/{name}", name, fill=7)
        with pytest.raises(DamagedChunkError):
            source.read(source.info.bounds)


def test_passing_faults(http: tuple[_Server, str]) -> None:
    server, url = http
    server.flaky = 2
    check(opened(f"{url}/precomputed-raw"))
    source = opened(f"{url}/n5-group")
    server.status = 503
    with pytest.raises(TransientError):
        source.read(source.info.bounds)
    server.status = None
    check(source)


def test_a_cut_connection_is_a_passing_fault(http: tuple[_Server, str]) -> None:
    server, url = http
    source = opened(f"{url}/zarr2-blosc", "zarr2")
    server.cut = True
    with pytest.raises(TransientError):
        source.read(source.info.bounds)


def test_forbidden(http: tuple[_Server, str]) -> None:
    server, url = http
    source = opened(f"{url}/n5-group")
    server.status = 403
    with pytest.raises(Exception, match="permission denied"):
        source.read(source.info.bounds)


@pytest.mark.parametrize("where", ["http", "s3"])
def test_zarr_chunks_in_nested_folders_and_of_other_codecs(
    where: str, http: tuple[_Server, str], s3: object, tmp_path: Path
) -> None:
    """What .zarray does not say is found by the chunks of a store too; what numcodecs decodes is fetched there."""
    hand_zarr.zarr2(tmp_path / "nested", names="/", drop=("dimension_separator",))
    hand_zarr.zarr2(tmp_path / "lzma", encode=lambda p: lzma.compress(p.tobytes()), compressor={"id": "lzma"})
    http[0].root = tmp_path
    for name in ("nested", "lzma"):
        url = f"{http[1]}/{name}"
        if where == "s3":
            upload(s3, tmp_path / name, name)
            url = f"s3://volumes/{name}"
        source = opened(url, "zarr2")
        np.testing.assert_array_equal(source.read(source.info.bounds), hand_zarr.TRUTH)
