"""Keys and bytes on files: what a store promises of writes, listings and errors, whatever kind it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import DamagedChunkError, EmsrError, MissingChunkError, TransientError, UserError
from pipeline.storage.kv import Store, classify


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/s")


def test_a_write_that_fails_is_told_and_the_others_are_done(store: Store, tmp_path: Path) -> None:
    """Where a file stands in the place of a folder nothing can be put below it."""
    store.put("file", b"x")
    with pytest.raises(EmsrError, match="file/below"):
        store.put_all({"a": b"1", "file/below": b"2", "z": b"3"})
    assert (store.get("a"), store.get("z")) == (b"1", b"3")


def test_a_conditional_write_needs_the_version_that_was_seen(store: Store) -> None:
    absent, none_yet = store.get_with_generation("k")
    assert absent is None
    assert store.put_if("k", b"first", none_yet)
    assert not store.put_if("k", b"late", none_yet)
    value, seen = store.get_with_generation("k")
    assert value == b"first"
    assert store.put_if("k", b"second", seen)
    assert not store.put_if("k", b"late", seen)
    assert store.get("k") == b"second"


def test_keys_are_those_of_the_prefix_and_no_locks(store: Store, tmp_path: Path) -> None:
    for key in ("a/1", "a/2", "a0", "b/1", "c"):
        store.put(key, b"x")
    (tmp_path / "s" / "a" / "3.__lock").touch()
    assert store.keys("a/") == ["a/1", "a/2"]
    assert store.keys() == ["a/1", "a/2", "a0", "b/1", "c"]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
def test_many_values_come_in_order_whole_batches_or_not(count: int, store: Store) -> None:
    store.put_all({f"{i}": bytes([i]) for i in range(0, count, 2)})
    wanted = [(f"{i}", None if i % 2 else bytes([i])) for i in range(count)]
    assert list(store.get_all(f"{i}" for i in range(count))) == wanted


NAMES = [
    "is missing",
    "not found",
    "404 NOT_FOUND: x",
    "Permission denied PERMISSION_DENIED: ",
    "UNAVAILABLE: 503",
    "NoSuchBucket",
    "No space left on device [os_error_code='28']",
    "checksum crc32c DATA_LOSS: ",
    "a\"b'c [os_error_code='28']",
    "two\nlines\nNOT_FOUND: ",
    "50%25 100%",
    "sch\u00f6n \u2603",
]
"""Names of folders that read like reasons, or that are hard to quote."""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_reason(name: str, tmp_path: Path) -> None:
    """What tensorstore really says of a chunk that is absent, cut short, or a loop of links, in a folder of such a
    name."""
    import tensorstore as ts

    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/{name}/"}}
    array = ts.open(
        where, create=True, dtype=ts.uint8, shape=[4, 8, 8], chunk_layout=ts.ChunkLayout(chunk_shape=[4, 4, 4])
    )
    array.result()[:, :4, :4].write(np.full((4, 4, 4), 7, np.uint8)).result()

    def fault(y: int) -> EmsrError:
        opened = ts.open({**where, "fill_missing_data_reads": False}).result()
        with pytest.raises(ValueError, match=r"[A-Z]+: ") as caught:
            opened[:, y : y + 4, :4].read().result()
        return classify(caught.value, "place")

    chunk = tmp_path / name / "c" / "0" / "0" / "0"
    assert type(fault(4)) is MissingChunkError
    chunk.write_bytes(chunk.read_bytes()[:5])
    assert type(fault(0)) is DamagedChunkError
    chunk.unlink()
    chunk.symlink_to(chunk)
    assert type(fault(0)) is not MissingChunkError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("UNAVAILABLE: the service is gone"), TransientError),
        (ValueError("DEADLINE_EXCEEDED: 504"), TransientError),
        (ValueError("RESOURCE_EXHAUSTED: HTTP response code: 429"), TransientError),
        (ValueError("ABORTED: try again"), TransientError),
        (ValueError("INTERNAL: HTTP response code: 500"), TransientError),
        (ValueError("UNKNOWN: HTTP/2 framing layer"), TransientError),
        (ConnectionResetError("reset"), TransientError),
        (ValueError("NOT_FOUND: no such key"), MissingChunkError),
        (ValueError("NOT_FOUND: The specified bucket does not exist"), UserError),
        (ValueError("NOT_FOUND: NoSuchBucket [http_response_code='404']"), UserError),
        (ValueError("NOT_FOUND: Not Found [http_response_body='<Error><Code>NoSuchBucket</Code></Error>']"), UserError),
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: \"/a\": No space left [os_error_code='28']"), UserError),
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: \"/a\": quota [os_error_code='122']"), UserError),
        (ValueError("PERMISSION_DENIED: 403"), UserError),
        (PermissionError("no"), UserError),
        (ValueError("DATA_LOSS: CRC mismatch"), DamagedChunkError),
        (ValueError("something else"), DamagedChunkError),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(error: Exception, kind: type[EmsrError]) -> None:
    """Passing faults alone are tried again, missing chunks alone may be filled, and the user mends the rest."""
    found = classify(error, "place")
    assert type(found) is kind
    assert "place" in str(found)
