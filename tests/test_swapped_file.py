"""Compare-and-swap among processes: of those that saw the same version one writes, whoever is killed or stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, wait_until

from pipeline.storage import swapped_file
from pipeline.storage.files import VERSION
from pipeline.storage.swapped_file import look, swap

# Adds one to the count, again and again; what it does is in its log before the next step.
_ADDER = """
import json, os, sys
from pathlib import Path
from pipeline.storage.swapped_file import look, swap
path, log = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while True:
    value, generation = look(path)
    count = json.loads(value)["count"] + 1
    os.write(log, b"try %d\\n" % count)
    if swap(path, json.dumps({"count": count, "by": os.getpid()}).encode(), generation):
        os.write(log, b"won %d\\n" % count)
"""


def put(path: Path, **members: object) -> bytes:
    """The value is replaced, and its new generation returned."""
    new = swap(path, json.dumps(members).encode(), look(path)[1])
    assert new is not None
    return new


def value(path: Path) -> dict[str, object]:
    found = json.loads(look(path)[0] or b"{}")
    return {key: member for key, member in found.items() if key not in ("version", "after")}


def test_no_addition_of_several_processes_is_lost_while_some_are_killed_and_stopped(tmp_path: Path) -> None:
    path, rng, started = tmp_path / "s" / "n.json", random.Random(11), []
    path.parent.mkdir()
    put(path, count=0)

    def start() -> subprocess.Popen[bytes]:
        log = tmp_path / f"log{len(started)}"
        started.append(log)
        environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen([sys.executable, "-c", _ADDER, str(path), str(log)], env=environ)

    def count() -> int:
        return int(str(value(path)["count"]))

    adders = [start() for _ in range(4)]
    try:
        for _ in range(30):
            goal = count() + rng.randint(1, 60)
            wait_until(lambda goal=goal: count() >= goal, "nobody adds")
            at = rng.randrange(len(adders))
            adders[at].send_signal(signal.SIGSTOP)
            goal = count() + rng.randint(1, 10)
            wait_until(lambda goal=goal: count() >= goal, "one that is stopped keeps the others from adding")
            if rng.random() < 0.4:
                adders[at].kill()
                adders[at].wait()
                adders[at] = start()
            else:
                adders[at].send_signal(signal.SIGCONT)
    finally:
        for adder in adders:
            adder.kill()
            adder.wait()
    lines = [line.split() for log in started if log.exists() for line in log.read_text().splitlines()]
    won = sorted(int(number) for what, number in lines if what == "won")
    assert len(won) == len(set(won)) > 300, "two processes wrote the same version"
    unsaid = set(range(1, count() + 1)) - set(won)
    assert len(unsaid) <= len(started), "only one that is killed may have written without saying so"
    assert max(won) <= count(), "a version was lost"


def test_without_hard_links_one_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "this file system has no hard links")

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "n.json"
    generation = put(path, n=1)
    assert swap(path, b'{"n": 2}', generation)
    assert swap(path, b'{"n": 3}', generation) is None
    assert value(path) == {"n": 2}


def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server carries the call out, its answer is lost, and the second try says that the name is there."""
    real = os.link

    def twice(old: Path, new: Path) -> None:
        real(old, new)
        real(old, new)

    monkeypatch.setattr(os, "link", twice)
    put(tmp_path / "n.json", n=1)
    assert value(tmp_path / "n.json") == {"n": 1}


def test_one_that_slept_through_many_versions_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version's number was taken, superseded and removed between its look and its link."""
    path, real = tmp_path / "n.json", os.link
    generation = put(path, n=1)

    def late(old: Path, new: Path) -> None:
        monkeypatch.setattr(os, "link", real)
        for n in (2, 3, 4):
            put(path, n=n)
        real(old, new)

    monkeypatch.setattr(os, "link", late)
    assert swap(path, b'{"n": 99}', generation) is None
    assert value(path) == {"n": 4}


def test_a_copy_that_comes_late_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has won, sleeps, is superseded twice, and only then puts the copy for readers in its place."""
    path, real = tmp_path / "n.json", os.replace
    put(path, n=1)

    def late(old: Path, new: Path) -> None:
        monkeypatch.setattr(os, "replace", real)
        put(path, n=3)
        put(path, n=4)
        real(old, new)

    monkeypatch.setattr(os, "replace", late)
    put(path, n=2)
    assert value(path) == {"n": 4}
    put(path, n=5)
    assert json.loads(path.read_bytes())["n"] == 5


def test_what_is_put_by_hand_counts_and_what_is_removed_by_hand_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "n.json"
    generation = put(path, n=1)
    generation = swap(path, b'{"n": 2}', generation) or b""
    for by_hand in (b'{"n": 7}', path.read_bytes().replace(b"2", b"8", 1), b"", b"no JSON"):
        path.write_bytes(by_hand)
        assert look(path)[0] == by_hand
        assert swap(path, b'{"n": 3}', generation) is None, "the writer before has not seen it"
    path.unlink()
    assert look(path)[0] is None
    assert swap(path, b'{"n": 3}', generation) is None
    put(path, n=4)
    assert value(path) == {"n": 4}


def test_a_copied_folder_goes_on_with_or_without_the_versions(tmp_path: Path) -> None:
    path = tmp_path / "a" / "n.json"
    put(path, n=1)
    put(path, n=2)
    shutil.copytree(path.parent, tmp_path / "b")
    (tmp_path / "c").mkdir()
    shutil.copy(path, tmp_path / "c")
    for folder in (tmp_path / "b", tmp_path / "c"):
        copied = folder / "n.json"
        generation = look(copied)[1]
        assert value(copied) == {"n": 2}
        assert swap(copied, b'{"n": 3}', generation)
        assert swap(copied, b'{"n": 4}', generation) is None
        assert value(copied) == {"n": 3}
        assert sorted(os.listdir(folder)) == ["n.json", f"n.json{VERSION}3"]


def test_a_version_cut_off_without_hard_links_is_seen_as_it_is(tmp_path: Path) -> None:
    """So the lock's reader finds something that is no lock, and refuses."""
    path = tmp_path / "n.json"
    put(path, n=1)
    swapped_file._version(path, 2).write_bytes(b'{"n"')
    assert look(path)[0] == b'{"n"'


def test_a_version_that_is_listed_and_never_readable_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file server's folder may be late for good. Nothing is written then, and nobody waits for ever."""
    monkeypatch.setattr(swapped_file, "LOOK_S", 0.0)
    path = tmp_path / "lock.json"
    assert swap(path, b"{}", look(path)[1])
    before = path.read_bytes()
    (tmp_path / f"lock.json{VERSION}9").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match=f"lock.json{VERSION}9") as caught:
        look(path)
    assert caught.value.errno == errno.ESTALE
    assert path.read_bytes() == before
