"""What stores answer where nothing is, and web servers that lack something: right voxels, or told before the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from odd_servers import PAGE, OddServer, serving
from source_volumes import FORMATS, VOXEL_NM, truth

from pipeline.base.errors import DamagedChunkError, DeniedError, EmsrError, MissingChunkError, SourceError, UserError
from pipeline.config.volume import FillConfig, MaskConfig, SourceConfig
from pipeline.storage.kv import Store
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.volume import Source
from pipeline.viewer import layers

CARRIED = ["zarr2-blosc", "zarr3-sharded-blosc", "ome-0.4", "ome-0.5", "n5-group", "precomputed-raw"]
SHARDED = ["zarr3-sharded-blosc", "precomputed-sharded-raw"]
HOLED = [*CARRIED, "precomputed-sharded-raw"]
METADATA = ("info", "attributes.json", "zarr.json", ".zarray", ".zattrs", ".zgroup")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    for name in {*CARRIED, *SHARDED}:
        FORMATS[name](root / name)
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[OddServer]:
    with serving(folder) as found:
        yield found


@pytest.fixture
def holed(folder: Path, tmp_path: Path) -> Iterator[OddServer]:
    """A server of volumes that each lack one object of voxels."""
    for name in HOLED:
        shutil.copytree(folder / name, tmp_path / name)
        min(chunks(tmp_path / name)).unlink()
    with serving(tmp_path) as found:
        yield found


def chunks(volume: Path) -> list[Path]:
    """Its objects of voxels, of all levels."""
    return [file for file in volume.rglob("*") if file.is_file() and file.name not in (*METADATA, "provenance")]


def opened(url: str, fill: int | None = None) -> Source:
    size = VOXEL_NM if "/zarr" in url else None
    return open_source(
        SourceConfig(url=url, voxel_size_nm=size, missing_chunks="error" if fill is None else FillConfig(fill=fill))
    )


def check(source: Source) -> None:
    np.testing.assert_array_equal(source.read(source.info.bounds), truth())


@pytest.mark.parametrize("name", HOLED)
def test_403_for_what_is_absent_is_a_hole(name: str, holed: OddServer) -> None:
    """As a bucket answers that may be read, not listed: filled as behind 404, and told as a hole without a fill."""
    behind_404 = opened(f"{holed.url}/{name}", 7)
    wanted = behind_404.read(behind_404.info.bounds)
    holed.absent = (403, b"<Error><Code>AccessDenied</Code></Error>")
    source = opened(f"{holed.url}/{name}", 7)
    np.testing.assert_array_equal(source.read(source.info.bounds), wanted)
    source = opened(f"{holed.url}/{name}")
    with pytest.raises(MissingChunkError, match=r"403.*may be absent.*source\.missing_chunks: \{fill: 0\}"):
        source.read(source.info.bounds)


def test_403_where_absent_keys_are_404_is_a_lack_of_rights(server: OddServer) -> None:
    one = str(min(chunks(server.root / "precomputed-raw")).relative_to(server.root))
    server.denied = lambda path: path == f"/{one}"
    for fill in (None, 7):
        source = opened(f"{server.url}/precomputed-raw", fill)
        with pytest.raises(DeniedError, match="permission denied"):
            source.read(source.info.bounds)


def test_no_readable_chunk_at_all_is_a_lack_of_rights(server: OddServer) -> None:
    """Nothing but fill would be invented where the metadata alone may be read."""
    server.absent = (403, b"")
    server.denied = lambda path: Path(path).name not in METADATA
    source = opened(f"{server.url}/ome-0.5", 7)
    with pytest.raises(UserError, match=r"so are all of \d+ chunks.*s3:ListBucket"):
        source.read(source.info.bounds)


def test_metadata_behind_403(server: OddServer) -> None:
    server.absent = (403, b"")
    for name in CARRIED:
        check(opened(f"{server.url}/{name}"))
    with pytest.raises(SourceError, match=r"permission denied.*absent too"):
        opened(f"{server.url}/absent")


def test_holes_of_a_mask_behind_403(holed: OddServer) -> None:
    holed.absent = (403, b"")
    source = opened(f"{holed.url}/ome-0.4", 7)
    mask = open_mask(MaskConfig(url=f"{holed.url}/n5-group", missing_chunks=FillConfig(fill=0)), source.info)
    assert set(np.unique(mask.read(mask.info.bounds))) == {0, 1}
    mask = open_mask(MaskConfig(url=f"{holed.url}/n5-group"), source.info)
    with pytest.raises(MissingChunkError, match=r"source\.mask\.missing_chunks"):
        mask.read(mask.info.bounds)


@pytest.mark.parametrize("ranges", ["no", "whole", "never"])
@pytest.mark.parametrize("name", SHARDED)
def test_shards_need_parts(name: str, ranges: str, server: OddServer) -> None:
    server.ranges = ranges
    with pytest.raises(SourceError, match=r"is sharded, and its server does not answer Range.*nginx"):
        opened(f"{server.url}/{name}")


@pytest.mark.parametrize("ranges", ["no", "whole", "never"])
def test_other_volumes_do_not(ranges: str, server: OddServer) -> None:
    server.ranges = ranges
    for name in ("zarr2-blosc", "n5-group", "precomputed-raw"):
        check(opened(f"{server.url}/{name}"))


@pytest.mark.parametrize("name", CARRIED)
def test_a_redirect_names_where_to(name: str, server: OddServer) -> None:
    """And the url that it names works."""
    for location in ("/new", f"{server.url}/new"):
        server.moved = lambda path, to=location: None if path.startswith("/new") else to + path  # type: ignore[misc]
        with pytest.raises(SourceError, match=rf"redirect \(302\).*Give the url {server.url}/new/{name}\.$"):
            opened(f"{server.url}/{name}")
    root = server.root
    server.root = root.parent
    (root.parent / "new").symlink_to(root)
    try:
        check(opened(f"{server.url}/new/{name}"))
    finally:
        (root.parent / "new").unlink()


def test_a_redirect_to_a_login_or_in_a_circle(server: OddServer) -> None:
    server.moved = lambda path: None if path == "/login" else f"/login?next={path}&token=abcdef"
    with pytest.raises(SourceError, match="may ask for a login") as caught:
        opened(f"{server.url}/n5-group")
    assert "abcdef" not in str(caught.value)
    server.moved = lambda path: path
    with pytest.raises(SourceError, match="to itself"):
        opened(f"{server.url}/n5-group")


def test_absent_keys_alone_are_redirected(server: OddServer) -> None:
    server.moved = lambda path: None if (server.root / path[1:]).is_file() else "/sorry.html"
    for name in CARRIED:
        check(opened(f"{server.url}/{name}"))


def test_chunks_that_are_redirected_are_no_damage(server: OddServer) -> None:
    """A store of large files elsewhere, which tensorstore does not follow."""
    server.moved = lambda path: None if Path(path).name in METADATA else "/elsewhere" + path
    source = opened(f"{server.url}/n5-group", 7)
    with pytest.raises(UserError, match=r"redirect \(302\)"):
        source.read(source.info.bounds)


@pytest.mark.parametrize("body", [PAGE, b'{"status": 404, "path": "there"}', b"", b"not found"])
@pytest.mark.parametrize("name", [*CARRIED, *SHARDED[1:]])
def test_pages_in_place_of_404(name: str, body: bytes, server: OddServer) -> None:
    server.absent = (200, body)
    check(opened(f"{server.url}/{name}"))
    with pytest.raises(SourceError, match="is a page, as this server has"):
        opened(f"{server.url}/absent")
    with pytest.raises(SourceError, match=r"answers a page.*404 for what is absent.*source\.missing_chunks"):
        opened(f"{server.url}/{name}", fill=0)


@pytest.mark.parametrize("name", CARRIED)
def test_a_page_in_place_of_a_chunk_is_never_voxels(name: str, holed: OddServer) -> None:
    holed.absent = (200, PAGE)
    source = opened(f"{holed.url}/{name}")
    with pytest.raises(DamagedChunkError, match="answers a page where nothing is: the chunk may be absent"):
        source.read(source.info.bounds)


def test_a_page_as_long_as_a_raw_chunk_is_refused(holed: OddServer) -> None:
    size = min(chunks(holed.root / "precomputed-raw")).stat().st_size
    holed.absent = (200, b"<" * size)
    with pytest.raises(SourceError, match="answers a page"):
        opened(f"{holed.url}/precomputed-raw")


def test_metadata_cut_short_are_still_damage(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "ome-0.5", tmp_path / "cut")
    (tmp_path / "cut" / "zarr.json").write_bytes((folder / "ome-0.5" / "zarr.json").read_bytes()[:40])
    with serving(tmp_path) as server, pytest.raises(SourceError, match=r"is not JSON.*half written"):
        opened(f"{server.url}/cut")


@pytest.mark.parametrize("way", ["compress", "chunked", "HTTP/1.0"])
@pytest.mark.parametrize("name", CARRIED)
def test_other_ways_to_send_a_body(name: str, way: str, server: OddServer) -> None:
    if way == "HTTP/1.0":
        server.version = way
    else:
        setattr(server, way, True)
    check(opened(f"{server.url}/{name}"))


def test_python_s_own_server(folder: Path) -> None:
    """`python -m http.server`: HTTP/1.0, no parts."""
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name in ("zarr2-blosc", "n5-group", "precomputed-raw", "ome-0.4"):
        check(opened(f"{url}/{name}"))
    for name in SHARDED:
        with pytest.raises(EmsrError, match="Range"):
            opened(f"{url}/{name}")
    server.shutdown()
    server.server_close()


def test_the_viewer_finds_metadata_behind_odd_answers(server: OddServer) -> None:
    """What `view` reads of a source is found as `run` finds it."""
    for absent in ((403, b""), (200, PAGE)):
        server.absent = absent
        for name in CARRIED:
            native = layers._native(f"{server.url}/{name}")
            assert native is not None, name
            assert tuple(native.shape) == truth().shape, name


def test_a_target_that_may_not_be_listed(server: OddServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    server.denied = lambda path: True
    store = Store(f"s3+{server.url}/bucket/sr")
    with pytest.raises(DeniedError, match=r"right to list there \(s3:ListBucket"):
        store.keys()
    with pytest.raises(DeniedError, match=r"right to list there \(s3:ListBucket"):
        store.is_empty()


@pytest.mark.parametrize(
    ("status", "code", "saw"),
    [
        (400, "ExpiredToken", "does not accept these credentials"),
        (403, "InvalidAccessKeyId", "does not accept these credentials"),
        (403, "InvalidObjectState", r"archived \(Glacier\)"),
        (301, "PermanentRedirect", "another region"),
        (400, "AuthorizationHeaderMalformed", "another region"),
    ],
)
def test_s3_s_other_refusals_are_neither_holes_nor_damage(
    status: int, code: str, saw: str, server: OddServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk in the archive is no hole, and an expired token damages nothing: a fill must not take their place."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    one = min(chunks(server.root / "ome-0.5"))
    key, here = f"/volumes/{one.relative_to(server.root)}", server.root.parent / "volumes"
    here.symlink_to(server.root)
    server.root, inside = server.root.parent, server.root
    source = opened(f"s3+{server.url}/volumes/ome-0.5", 7)
    server.refusal = key, (status, f"<Error><Code>{code}</Code><Token-0>hunter22</Token-0></Error>".encode())
    try:
        with pytest.raises(UserError, match=saw) as caught:
            source.read(source.info.bounds)
        assert not isinstance(caught.value, DeniedError)
        assert "hunter22" not in str(caught.value)
    finally:
        server.root = inside
        here.unlink()
