"""Keys and bytes on files: what a store promises of writes, listings and errors, whatever kind it is."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.base.errors import (
    DamagedChunkError,
    DeniedError,
    EmsrError,
    MissingChunkError,
    MovedError,
    TransientError,
    UserError,
)
from pipeline.storage import files
from pipeline.storage.kv import Store, classify
from pipeline.storage.targets.open import is_empty


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
    first = store.put_if("k", b'{"n": 1}', none_yet)
    assert first
    assert not store.put_if("k", b'{"n": 0}', none_yet)
    value, seen = store.get_with_generation("k")
    assert value is not None
    assert (json.loads(value)["n"], seen) == (1, first)
    assert store.put_if("k", b'{"n": 2}', seen)
    assert not store.put_if("k", b'{"n": 0}', seen)
    assert json.loads(store.get("k") or b"")["n"] == 2


def test_reading_leaves_a_folder_as_it_was(store: Store, tmp_path: Path) -> None:
    """Sources belong to others, and `status` and `--dry-run` touch nothing: no file is made there, not for a moment."""
    store.put("a", b"1")
    before = (tmp_path / "s").stat().st_mtime_ns
    assert (store.get("a"), store.get("b"), store.get("a/below"), store.get_at_most("a", 9)) == (b"1", None, None, b"1")
    assert store.keys() == store.keys_between("", "") == ["a"]
    assert (tmp_path / "s").stat().st_mtime_ns == before


def test_keys_are_those_of_the_prefix_and_no_locks(store: Store, tmp_path: Path) -> None:
    for key in ("a/1", "a/2", "a0", "b/1", "c"):
        store.put(key, b"x")
    for name in ("3.__lock", files.PART + "m-1-1-1", f"4{files.VERSION}12"):
        (tmp_path / "s" / "a" / name).touch()
    assert store.keys("a/") == ["a/1", "a/2"]
    assert store.keys() == store.keys_between("", "") == ["a/1", "a/2", "a0", "b/1", "c"]
    assert store.keys_between("a/2", "b/1") == ["a/2", "a0"]


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
        (ValueError("PERMISSION_DENIED: 403"), DeniedError),
        (ValueError("UNAUTHENTICATED: 401"), DeniedError),
        (ValueError("FAILED_PRECONDITION: Error reading http://h/k: Unknown [HTTP code 302]"), MovedError),
        (
            ValueError("FAILED_PRECONDITION: http://h/k: Requested byte range [-9, ?) was ignored by server"),
            UserError,
        ),
        (ValueError("INVALID_ARGUMENT: Bucket is requester pays bucket but no user project provided."), UserError),
        (PermissionError("no"), DeniedError),
        (ValueError("DATA_LOSS: CRC mismatch"), DamagedChunkError),
        (ValueError("something else"), DamagedChunkError),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(error: Exception, kind: type[EmsrError]) -> None:
    """Passing faults alone are tried again, missing chunks alone may be filled, and the user mends the rest."""
    found = classify(error, "place")
    assert type(found) is kind
    assert "place" in str(found)


def test_what_a_killed_tensorstore_left_is_no_tail_of_a_later_write(store: Store, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "k.__lock").write_bytes(b"old" * 100)
    store.put("k", b"new")
    assert (tmp_path / "s" / "k").read_bytes() == b"new"


# Each call that changes the disk counts as a step; the process is killed before step sys.argv[2].
_KILLED = """
import os, sys
from pathlib import Path
steps = 0
def counted(call):
    def one(*args, **kwargs):
        global steps
        if steps == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        steps += 1
        return call(*args, **kwargs)
    return one
def half(file, data):
    return write(file, data[: len(data) // 2 or 1])
from pipeline.storage import kv, files
from pipeline.storage.kv import Store
write = os.write
os.write = half
files._threads = lambda: type("Inline", (), {"map": staticmethod(map)})
for name in ("open", "write", "fsync", "close", "replace", "mkdir", "link", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
store = Store("file://" + sys.argv[1])
steps = 0
if sys.argv[3] == "put":
    store.put_all({"a/b/one": b"1" * 5000, "a/two": b"2" * 5000, "c": b"3"})
else:
    value, generation = store.get_with_generation("k")
    assert store.put_if("k", b'{"n": 2}', generation)
"""


def _killed_at(step: int, folder: Path, what: str) -> bool:
    """Whether the process was killed; it is not where it has fewer steps."""
    environ = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(step), what], env=environ, check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


def test_a_process_killed_at_any_step_leaves_every_object_old_new_or_absent(tmp_path: Path) -> None:
    """And nothing that readers see, that a later write minds, or that the next run's sweep leaves."""
    step = 0
    while _killed_at(step, tmp_path / f"{step}" / "s", "put"):
        folder = tmp_path / f"{step}" / "s"
        store = Store(f"file://{folder}")
        values = dict(store.get_all(["a/b/one", "a/two", "c"]))
        assert values["a/b/one"] in (None, b"1" * 5000)
        assert values["a/two"] in (None, b"2" * 5000)
        assert store.keys() == sorted(key for key, value in values.items() if value is not None)
        assert is_empty(store.url) == store.is_empty() == (not store.keys())
        store.put_all({"a/b/one": b"x", "a/two": b"y", "c": b"z"})
        store.sweep()
        assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) == ["a/b/one", "a/two", "c"]
        step += 1
    assert step > 20


def test_a_process_killed_at_any_step_of_a_conditional_write_wrote_it_or_not(tmp_path: Path) -> None:
    """The next process goes on from what is there, and of two that saw the same one alone writes."""
    step, seen_by_now = 0, set()
    while True:
        folder = tmp_path / f"{step}"
        store = Store(f"file://{folder}")
        store.put_if("k", b'{"n": 1}', store.get_with_generation("k")[1])
        if not _killed_at(step, folder, "swap"):
            break
        value, generation = store.get_with_generation("k")
        seen_by_now.add(json.loads(value or b"")["n"])
        assert store.put_if("k", b'{"n": 3}', generation)
        assert not store.put_if("k", b'{"n": 4}', generation)
        assert json.loads(store.get_with_generation("k")[0] or b"")["n"] == 3
        assert json.loads(store.get("k") or b"")["n"] == 3
        store.sweep()
        assert len(list(folder.iterdir())) == 2, "the newest version and its copy"
        step += 1
    assert seen_by_now == {1, 2}


def test_a_write_cut_off_in_the_middle_is_told_and_leaves_what_was_there(store: Store, tmp_path: Path) -> None:
    """A limit of file sizes ends it as a full disk does: some bytes are written, the rest are refused."""
    store.put("k", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(UserError, match=r"k: the file would be too large .*ulimit -f"):
            store.put("k", b"n" * 8000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.get("k") == b"old"
    assert os.listdir(tmp_path / "s") == ["k"]


def test_a_name_may_be_as_long_as_names_may_be(store: Store) -> None:
    store.put("x" * 255, b"1")
    assert store.keys() == ["x" * 255]
    with pytest.raises(UserError, match="path is too long"):
        store.put("x" * 256, b"1")


def test_modes_are_what_the_umask_leaves(store: Store, tmp_path: Path) -> None:
    """Groups share targets: a temporary file must not make a shard private."""
    before = os.umask(0o027)
    try:
        store.put("a/b", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "s" / "a" / "b").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "s" / "a").stat().st_mode & 0o777 == 0o750


def test_a_linked_target_and_a_folder_on_another_disk_are_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "s").symlink_to(tmp_path / "there")
    store.put("k", b"1")
    assert (tmp_path / "there" / "k").read_bytes() == b"1"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != tmp_path.stat().st_dev
        (tmp_path / "there" / "0").symlink_to(other)
        store.put("0/c", b"2")
        assert os.listdir(other) == ["c"]


def test_a_folder_that_is_removed_under_way_is_made_again(store: Store, tmp_path: Path) -> None:
    store.put_all({"a/1": b"1", "a/2": b"2"})
    shutil.rmtree(tmp_path / "s")
    store.put_all({"a/3": b"3", "a/4": b"4"})
    assert store.keys() == ["a/3", "a/4"]


def test_a_sweep_takes_what_nobody_writes_any_more(store: Store, tmp_path: Path) -> None:
    """Of this machine's processes the dead ones', of others' what is old; never a live process's."""
    folder = tmp_path / "s"
    ours = files.write_part(folder, b"x")
    machine = ours.name[len(files.PART) :].split("-")[0]
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    names = {
        "dead": f"{machine}-{dead.pid}-1-0",
        "number taken again": f"{machine}-{os.getpid()}-1-0",
        "elsewhere, old": "0123456789abcdef-1-1-0",
        "elsewhere": "0123456789abcdef-1-1-1",
    }
    for name in names.values():
        (folder / (files.PART + name)).touch()
    os.utime(folder / (files.PART + names["elsewhere, old"]), (0, 0))
    store.sweep()
    assert {ours.name, files.PART + names["elsewhere"]} == set(os.listdir(folder))


def test_a_name_that_is_not_utf8_is_listed_as_it_can_be(tmp_path: Path) -> None:
    """What else lies in a folder, such as an editor's backup, ends no run."""
    (tmp_path / "plan.json").touch()
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9", os.O_CREAT))
    store = Store(tmp_path.as_uri())
    assert store.keys() == ["caf\\xe9", "plan.json"]
    assert store.keys("pl") == ["plan.json"]
    assert not store.is_empty()


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "sidecar").touch()
    with pytest.raises(UserError, match="a file stands where a folder is wanted"):
        Store((tmp_path / "sidecar").as_uri()).keys()
