"""Keys and bytes on files: what a store promises of writes, listings and errors, whatever kind it is."""

from __future__ import annotations

from pathlib import Path

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
        (ValueError("chunk {1, 2, 3} is missing"), MissingChunkError),
        (ValueError("UNKNOWN: write failed: No space left on device"), UserError),
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
