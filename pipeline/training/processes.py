"""The processes of a training on several devices: this one is rank 0 and starts the others, one per device.

They meet through a file and talk over the loopback interface, so that nothing else can reach them and no port can be
taken. A rank that ends, in whatever way, ends the others: started ranks end once their standard input does, and rank 0
watches them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from models.training.ranks import Ranks
from pipeline.base.errors import EmsrError
from pipeline.base.waits import waiting
from pipeline.config.stage import StageConfig

STALL_S = 900.0
"""Seconds that a rank waits for the others, which may be writing a checkpoint or reading from a slow store."""
GRACE_S = 20.0
"""Seconds that rank 0 has to notice by itself that another rank has ended, and the others to end after it."""


@contextmanager
def others(config: StageConfig, cuda: bool) -> Iterator[None]:
    """Within the block the ranks of `config` beside this one run, and all are connected. With one device nothing is
    done. Raises EmsrError, in place of what it leads to, where one of them ends early.
    """
    if config.devices == 1:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="emsr-ranks-") as folder:
        started = [_start(config, rank, Path(folder)) for rank in range(1, config.devices)]
        done = threading.Event()
        threading.Thread(target=_watch, args=(started, Path(folder), done), daemon=True).start()
        try:
            with waits():
                join(Path(folder), Ranks(0, config.devices), cuda)
            yield
            done.set()
            for process in started:
                process.wait(GRACE_S)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            if not _is_of_connections(error):
                raise
            if found := _wait_for_failure(started, Path(folder)):
                raise EmsrError(found) from None
            raise EmsrError(f"the processes of the devices have lost each other ({error})") from None
        finally:
            done.set()
            for process in started:
                process.kill()
                process.wait()
            if distributed.is_initialized():
                distributed.destroy_process_group()


def join(folder: Path, ranks: Ranks, cuda: bool) -> None:
    """Connect this rank to the others, which meet in `folder`."""
    if cuda:
        torch.cuda.set_device(ranks.rank)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=ranks.rank,
        world_size=ranks.count,
        timeout=timedelta(seconds=STALL_S),
    )


def waits() -> AbstractContextManager[None]:
    """Within the block this rank waits for the others."""
    return waiting("the processes of the other devices", STALL_S)


def end_with_input() -> None:
    """End this process, from now on, as soon as its standard input is closed: rank 0, which holds it, is gone."""

    def wait() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _is_of_connections(error: Exception) -> bool:
    """Whether this is no fault of the rank's own, such as a GPU whose memory is used up. gloo's have no class."""
    return isinstance(error, (subprocess.TimeoutExpired, distributed.DistError)) or "gloo" in str(error)


def _start(config: StageConfig, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    """Rank `rank`, in a session of its own: a signal to the terminal is for rank 0, which decides for all."""
    with (folder / f"rank-{rank}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.training.rank", str(rank), str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdin is not None
    process.stdin.write(config.model_dump_json().encode() + b"\n")
    process.stdin.flush()
    return process


def _watch(started: list[subprocess.Popen[bytes]], folder: Path, done: threading.Event) -> None:
    """End this process where a rank has ended early and it waits on for that rank, as with GPUs."""
    while not done.wait(0.5):
        if found := _failure(started, folder):
            if not done.wait(GRACE_S):
                print(f"emsr: {found}", file=sys.stderr, flush=True)
                os._exit(1)
            return


def _wait_for_failure(started: list[subprocess.Popen[bytes]], folder: Path) -> str:
    """A lost connection is seen before the end of its process."""
    end = time.monotonic() + GRACE_S
    while not (found := _failure(started, folder)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _failure(started: list[subprocess.Popen[bytes]], folder: Path) -> str:
    """What became of a rank that has ended otherwise than well, and its last line; empty where none has."""
    for rank, process in enumerate(started, 1):
        if process.poll():
            code = process.returncode
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            said = (folder / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()[-1:]
            return (
                f"the process of device {rank + 1} {how} ({' '.join(said) or 'without a word'}). "
                "The same command goes on from the last checkpoint"
            )
    return ""
