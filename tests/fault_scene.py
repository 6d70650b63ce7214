"""A scene is one target with the main job's commands on it as real processes, and what must hold after faults."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from conftest import GUARD_S, REPOSITORY, TESTS, texture, tree, volume_yaml, write_lr

from pipeline.base.geometry import ZYX
from pipeline.config.volume import SourceConfig
from pipeline.plan.receipt import WRITTEN
from pipeline.prepare import recorded
from pipeline.schedule.leases import LEASE_S
from pipeline.storage.sources.open import open_source

FLUSH_S = 0.5
PROMISE_S = LEASE_S + FLUSH_S + 5.0
"""This is the sum of a lease, the ledger's interval, and what a busy machine adds."""
SHAPE, MAX_SHAPE = (6, 48, 40), ZYX(8, 64, 64)


@dataclass
class Scene:
    """A scene has one target in a folder of its own, and what an undisturbed run makes of the same source."""

    folder: Path
    source: Path
    keys: dict[str, Any]
    undisturbed: Path
    rng: random.Random
    time_out_s: float = GUARD_S
    holds_promise: bool = False
    """The promise counts seconds, so only a harness on a machine of its own can hold it."""
    environ: dict[str, str] = field(default_factory=dict)
    disk: Path | None = None
    """The target lies here, when not in `folder`."""

    @property
    def yaml(self) -> Path:
        return self.folder / "v.yaml"

    @property
    def place(self) -> Path:
        return (self.disk or self.folder) / "sr"

    @property
    def log(self) -> Path:
        return self.folder / "slabs.log"

    def write(self, **changes: Any) -> None:
        volume_yaml(self.yaml, self.source, self.place, **(self.keys | changes))

    @contextlib.contextmanager
    def command(self, *words: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
        """This starts `emsr WORDS` with the stand-in network; whatever is left of it at the end is killed, and told."""
        env = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
            "FAULT_LOG": str(self.log),
            "FAULT_FLUSH_S": str(FLUSH_S),
            **self.environ,
            **environ,
        }
        said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        arguments = [sys.executable, str(TESTS / "run_faults.py"), *words]
        with subprocess.Popen(arguments, cwd=REPOSITORY, env=env, text=True, start_new_session=True, **said) as process:  # type: ignore[call-overload]
            try:
                yield process
                self.end(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """The result is a command's exit code and words; AssertionError tells that it hangs or leaves processes."""
        if process.stdout is None or process.stdout.closed:
            return process.returncode, ""
        try:
            said, _ = process.communicate(timeout=self.time_out_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hang: a command still runs after {self.time_out_s:.0f} s") from None
        self.wait(lambda: not _group(process.pid), f"processes left behind: {_group(process.pid)}")
        assert "Traceback" not in said, said
        return process.returncode, said

    def run(self, want: int = 0, words: str = "", **environ: str) -> str:
        """The main job runs to its end and must give this exit code and these words."""
        with self.command("run", str(self.yaml), **environ) as process:
            code, said = self.end(process)
        assert code == want, f"exit code {code}, wanted {want}: {said}"
        assert words in said, said
        return said

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + self.time_out_s
        while not condition():
            assert time.monotonic() < end, f"hang: {what}"
            time.sleep(0.02)

    def under_way(self, process: subprocess.Popen[str]) -> bool:
        """This waits until a random number of slabs have ended; it is False where the command has ended before that."""
        some = len(self.ended()) + self.rng.randint(1, 6)
        self.wait(lambda: len(self.ended()) >= some or process.poll() is not None, "no slab ends")
        time.sleep(self.rng.uniform(0, 1))
        return process.poll() is None

    def lines(self, event: str, since: int = 0) -> list[tuple[int, float]]:
        """The result has (task, when) of each such event in the log from byte `since` on."""
        if not self.log.exists():
            return []
        words = [line.split() for line in self.log.read_bytes()[since:].decode().splitlines()]
        return [(int(w[1]), float(w[3])) for w in words if len(w) == 4 and w[0] == event]

    def ended(self) -> list[tuple[int, float]]:
        return self.lines("end")

    def last_ended(self) -> float:
        """The last slab ended then, which is the time of a fault that stops all work."""
        return max((at for _, at in self.ended()), default=0.0)

    def recorded(self) -> set[int]:
        """The ledger holds these tasks as written."""
        found = recorded.read(self.place.as_uri(), "harness")
        return set(found.ledger.indices(WRITTEN)) if found is not None else set()

    def crash(self, when: float) -> None:
        """After everything has died, what is recorded is never begun again.

        Where the promise is held, all that had ended PROMISE_S before `when` is recorded.
        """
        held = self.recorded()
        late = {task for task, at in self.ended() if at < when - PROMISE_S} - held
        assert not (self.holds_promise and late), (
            f"promise: {late} had ended more than {PROMISE_S} s before the crash and are not recorded"
        )
        mark = self.log.stat().st_size if self.log.exists() else 0
        self.run()
        again = {task for task, _ in self.lines("begin", mark)} & held
        assert not again, f"kept: {again} were recorded and begun again"

    def check(self) -> None:
        """The target is that of an undisturbed run, and the ledger closes."""
        found = recorded.read(self.place.as_uri(), "harness")
        assert found is not None
        counts = found.ledger.counts()
        assert counts["pending"] == counts["quarantined"] == 0, f"not closed: {counts}"
        made = tree(self.place)
        wanted = tree(self.undisturbed / "sr")
        assert made == wanted, (
            f"other bytes: {sorted(k for k in made.keys() | wanted.keys() if made.get(k) != wanted.get(k))[:5]}"
        )


def _group(leader: int) -> list[str]:
    """The result has the command lines of the processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:80])
    return found


def undisturbed(folder: Path, source: Path | None) -> tuple[Path, dict[str, Any]]:
    """A run without faults puts `sr` and `sr.emsr` into `folder`.

    The result is its source (a made one without `source`) and the keys of its volume.yaml.
    """
    keys: dict[str, Any] = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}
    if source is None:
        source = write_lr(folder / "lr.zarr", texture(SHAPE))
    else:
        bounds = open_source(SourceConfig(url=source.as_uri())).info.bounds
        size = bounds.shape.minimum(MAX_SHAPE)
        start = bounds.start + (bounds.shape - size) // 2
        keys = {"source__box": {"start": list(start), "stop": list(start + size)}} | keys
    path = volume_yaml(folder / "v.yaml", source, folder / "sr", **keys)
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}"}
    subprocess.run(
        [sys.executable, str(TESTS / "run_faults.py"), "here", str(path)], cwd=REPOSITORY, env=environ, check=True
    )
    return source, keys
