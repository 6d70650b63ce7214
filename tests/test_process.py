"""Commands in the surroundings that batch systems, terminals and other programs give them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, run_here, texture, volume_yaml, wait_until, write_lr

from pipeline.base.command import guarded
from pipeline.base.errors import DiskError, EmsrError, TargetError, TransientError, UserError
from pipeline.base.output import Output
from pipeline.storage.kv import classify_write

ENVIRON = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    write_lr(tmp_path / "lr.zarr", texture((4, 32, 32)))
    return volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr")


def report(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "sr.emsr" / "report.json").read_text())


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The line's `$EMSR` is the command of this checkout."""
    environ = ENVIRON | {"EMSR": f"{sys.executable} -m emsr"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=GUARD_S,
    )


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>&1", "2>&1 | true"])
def test_a_run_needs_nobody_who_listens(streams: str, volume: Path, tmp_path: Path) -> None:
    """The exit code tells what became of the target; the report counts the lines that could not be written."""
    assert shell(f"$EMSR run v.yaml {streams}", tmp_path).returncode == 0
    what_is_there_to_print = 2 if "full" in streams else 0
    assert shell(f"$EMSR status v.yaml {streams}", tmp_path).returncode == what_is_there_to_print
    told = report(tmp_path)
    assert told["ledger"]["planned"] == told["ledger"]["written"]
    assert told["this_run"]["dropped_lines"] > 0


def test_a_state_that_is_not_written_is_no_success(volume: Path, tmp_path: Path) -> None:
    """Where what is printed is the product, its loss is told."""
    run_here(volume)
    said = shell("$EMSR view --state v.yaml >/dev/full", tmp_path)
    assert said.returncode == 2
    assert "could not be written" in said.stderr


@pytest.mark.parametrize("how", ["script.py", "- < script.py"])
def test_a_script_without_a_guard_runs_once(how: str, volume: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text('from pipeline.run import main\nprint("ended", main(["v.yaml"]))\n')
    said = shell(f"{sys.executable} {how}", tmp_path)
    assert said.stdout.count("ended 0") == 1 == said.stdout.count("ended")
    assert "Traceback" not in said.stderr


def test_a_process_that_may_start_none_is_told_so(volume: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import multiprocessing\nfrom pipeline.run import main\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.Pool(1) as pool:\n        print('ended', pool.apply(main, (['v.yaml'],)))\n"
    )
    said = shell(f"{sys.executable} script.py", tmp_path)
    assert "ended 2" in said.stdout
    assert "this process is daemonic" in said.stderr
    assert not (tmp_path / "sr.emsr").exists()


@pytest.mark.parametrize("ignored", [False, True], ids=["hung up", "nohup"])
def test_a_terminal_that_ends_drains_the_run(ignored: bool, tmp_path: Path) -> None:
    """SIGHUP reaches all processes of the terminal. The client drains as after Ctrl-C; under nohup nothing happens."""
    write_lr(tmp_path / "lr.zarr", texture((6, 72, 64)))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", network__name="nearest", work__slab_shape=[2, 16, 16])
    command = [sys.executable, str(TESTS / "run_standin.py"), str(path)]
    with subprocess.Popen(
        ["nohup", *command] if ignored else command,
        env=ENVIRON | {"STANDIN_DELAY_S": "0.05"},
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as client:
        wait_until(lambda: len(list((tmp_path / "sr").rglob("c/*/*/*"))) > 3 or client.poll() is not None)
        os.killpg(client.pid, signal.SIGHUP)
        _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == (0 if ignored else 130), said
    assert "Traceback" not in said
    counts = report(tmp_path)["ledger"]
    assert counts["quarantined"] == 0
    assert (counts["pending"] == 0) == ignored
    if not ignored:
        assert counts["written"] > 0
        main_job(path)
        assert report(tmp_path)["ledger"]["pending"] == 0


def test_a_limit_on_the_size_of_files_ends_the_run_at_once(volume: Path, tmp_path: Path) -> None:
    said = shell("ulimit -f 4; $EMSR run v.yaml", tmp_path)
    assert said.returncode == 2
    assert "`ulimit -f` allows 4,096 bytes" in said.stderr
    assert "quarantined" not in said.stderr
    assert shell("$EMSR run v.yaml && $EMSR verify v.yaml", tmp_path).returncode == 0


def test_a_limit_on_open_files_is_raised_as_far_as_it_may_be_or_named(volume: Path, tmp_path: Path) -> None:
    """With too few of them Dask waits for ever."""
    said = shell("ulimit -n 20; $EMSR run v.yaml", tmp_path)
    assert said.returncode == 2
    assert "which may have 20." in said.stderr
    assert shell("ulimit -S -n 20; $EMSR run v.yaml", tmp_path).returncode == 0


def test_a_folder_that_was_deleted_is_no_place_to_begin(volume: Path, tmp_path: Path) -> None:
    said = shell("mkdir gone; cd gone; rmdir ../gone; $EMSR status ../v.yaml", tmp_path)
    assert said.returncode == 2
    assert "the current folder was deleted" in said.stderr


def test_a_reader_that_does_not_read_holds_nothing_up() -> None:
    """A pager that is not scrolled: a line waits for it a moment, and is dropped."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(4096)):
            pass
    os.set_blocking(writer, True)
    with os.fdopen(writer, "w") as stream, os.fdopen(reader):
        lines = Output(stream, wait_s=0.01)
        lines.write("one\ntwo\n")
        lines.flush()
        assert lines.dropped == 2


def test_names_that_the_locale_cannot_write_are_escaped(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w", encoding="ascii") as stream:
        Output(stream).write("Gehirn-ü\udcff\n")
    assert (tmp_path / "said").read_text() == "Gehirn-\\xfc\\udcff\n"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "x"), UserError, "no space left"),
        (OSError(errno.EDQUOT, "x"), UserError, "quota"),
        (OSError(errno.EROFS, "x"), UserError, "read-only"),
        (PermissionError(errno.EACCES, "x"), UserError, "permission denied"),
        (OSError(errno.EIO, "x"), DiskError, "Input/output error"),
        (OSError(errno.ESTALE, "x"), DiskError, "Stale file handle"),
        (OSError(errno.EMFILE, "x"), DiskError, "Too many open files"),
        (ValueError("OUT_OF_RANGE: Failed writing: File too large [os_error_code='27']"), UserError, "too large"),
        (ValueError("FAILED_PRECONDITION: Not a directory [os_error_code='20']"), TargetError, "a file stands"),
        (ValueError("UNAVAILABLE: HTTP 503"), TransientError, "503"),
        (ValueError("DATA_LOSS: nonsense"), UserError, "nonsense"),
        (ValueError("NOT_FOUND: no such key"), UserError, "no such key"),
    ],
)
def test_a_write_never_fails_as_a_damaged_source(error: Exception, kind: type[EmsrError], words: str) -> None:
    found = classify_write(error, "writing it")
    assert type(found) is kind
    assert words in str(found)
    assert "writing it" in str(found)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (MemoryError(), "memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "/tmp/x"),
    ],
)
def test_what_a_process_runs_out_of_is_no_fault_of_emsr(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("Cluster failed to start") from cause

    assert guarded(work) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_a_signal_ends_a_command_in_order(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def work() -> int:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            closed.append(number)
        return 0

    assert guarded(work) == 130
    assert closed == [number]
    assert f"interrupted by {number.name}" in capsys.readouterr().err
