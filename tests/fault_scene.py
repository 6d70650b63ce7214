"""A scene is one target with the main job's commands on it as real processes, and what must hold after faults."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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


class Broken(AssertionError):
    """A law that does not hold: lost, different, not closed, two writers, hang, unseen, promise, or wrong answer."""

    def __init__(self, law: str, what: object = "") -> None:
        self.law = law
        super().__init__(f"{law}: {what}")


def hold(holds: object, law: str, what: object = "") -> None:
    """Raises Broken unless `holds`."""
    if not holds:
        raise Broken(law, what)


@dataclass
class Scene:
    """A scene has one target in a folder of its own, and what an undisturbed run makes of the same source."""

    folder: Path
    source: Path | str
    keys: dict[str, Any]
    undisturbed: Path
    rng: random.Random
    time_out_s: float = GUARD_S
    holds_promise: bool = False
    """The promise counts seconds, so only a harness on a machine of its own can hold it."""
    environ: dict[str, str] = field(default_factory=dict)
    disk: Path | None = None
    """The target lies here, when not in `folder`."""
    name: str = "sr"
    verifies: bool = True
    """verify is a part of `check`: not where what is checked is a copy of what the commands wrote."""

    @property
    def yaml(self) -> Path:
        return self.folder / "v.yaml"

    @property
    def place(self) -> Path:
        return (self.disk or self.folder) / self.name

    @property
    def log(self) -> Path:
        return self.folder / "slabs.log"

    def own(self, server: str = "", **keys: Any) -> Path:
        """The source becomes one of this scene alone, which may be changed, with an undisturbed run of its own.

        `server` serves the folder `own`. The result is the source's folder.
        """
        place = self.folder / "own"
        place.mkdir(exist_ok=True)
        self.source, self.keys = undisturbed(place, None, server, **keys)
        self.undisturbed = place
        self.write()
        return place / "lr.zarr"

    def write(self, **changes: Any) -> None:
        volume_yaml(self.yaml, self.source, self.place, **(self.keys | changes))

    @contextlib.contextmanager
    def command(
        self,
        *words: str,
        before: Sequence[str] = (),
        streams: dict[str, Any] | None = None,
        prepare: Callable[[], object] | None = None,
        **environ: str,
    ) -> Iterator[subprocess.Popen[str]]:
        """This starts `emsr WORDS` with the stand-in network; whatever is left of it at the end is killed, and told.

        `before` begins the command line, `streams` are given to Popen, `prepare` is called in the new process.
        """
        env = {
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
            "FAULT_LOG": str(self.log),
            "FAULT_FLUSH_S": str(FLUSH_S),
            **self.environ,
            **environ,
        }
        said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        how = {"cwd": REPOSITORY, "env": env, "text": True, "start_new_session": True, "preexec_fn": prepare}
        arguments = [*before, sys.executable, str(TESTS / "run_faults.py"), *words]
        with subprocess.Popen(arguments, **how, **(said | (streams or {}))) as process:
            try:
                yield process
                self.end(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """The result is a command's exit code and words; AssertionError tells that it hangs or leaves processes."""
        if process.stdout is not None and process.stdout.closed:
            return process.returncode, ""
        try:
            said, _ = process.communicate(timeout=self.time_out_s)
        except subprocess.TimeoutExpired:
            raise Broken("hang", f"a command still runs after {self.time_out_s:.0f} s") from None
        self.wait(lambda: not _group(process.pid), f"processes left behind: {_group(process.pid)}")
        hold("Traceback" not in (said or ""), "wrong answer", said)
        return process.returncode, said or ""

    def run(self, want: int = 0, words: str = "", **how: Any) -> str:
        """The main job runs to its end and must give this exit code and these words."""
        return self.answer("run", want=(want,), words=words, **how)

    def answer(self, *words_of_command: str, want: tuple[int, ...] = (0,), words: str = "", **how: Any) -> str:
        """A command on this target runs to its end and must give one of these exit codes and these words."""
        command, *flags = words_of_command
        with self.command(command, str(self.yaml), *flags, **how) as process:
            code, said = self.end(process)
        hold(code in want, "wrong answer", f"{command}: exit code {code}, wanted {want}: {said}")
        hold(words in said, "wrong answer", f"{command}: no {words!r} in {said}")
        return said

    def was_asked_to_end(self, code: int, said: str) -> None:
        """A command has drained, or had done all before it was asked: Python then no longer handles the signal."""
        hold(code in (0, 130) or (code < 0 and "done: " in said), "wrong answer", f"{code}: {said}")

    def interrupted(self) -> None:
        """The main job begins and is asked to end under way; a part of the target is there (or all of it)."""
        if not self.yaml.exists():
            self.write()
        with self.command("run", str(self.yaml), STANDIN_DELAY_S="0.1") as process:
            if self.under_way(process):
                process.send_signal(signal.SIGTERM)
            code, said = self.end(process)
        self.was_asked_to_end(code, said)

    def refused(self, words: str = "", **how: Any) -> None:
        """The main job is refused in words, and what the target holds stays as it was."""
        before = contents(self.place)
        self.run(2, words, **how)
        hold(contents(self.place) == before, "different", "a refused run changed the target")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + self.time_out_s
        while not condition():
            hold(time.monotonic() < end, "hang", what)
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
        return [(int(w[1]), float(w[3])) for w in words if len(w) == 5 and w[0] == event]

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
        hold(
            not (self.holds_promise and late),
            "promise",
            f"{late} had ended more than {PROMISE_S} s before the crash and are not recorded",
        )
        mark = self.log.stat().st_size if self.log.exists() else 0
        self.run()
        again = {task for task, _ in self.lines("begin", mark)} & held
        hold(not again, "lost", f"{again} were recorded and begun again")

    def check(self) -> None:
        """The target is that of an undisturbed run, the ledger closes, verify agrees, and one run wrote at a time."""
        self.check_writers()
        found = recorded.read(self.place.as_uri(), "harness")
        hold(found is not None, "lost", "the plan")
        assert found is not None
        counts = found.ledger.counts()
        hold(counts["pending"] == counts["quarantined"] == 0, "not closed", counts)
        made, wanted = contents(self.place), contents(self.undisturbed / "sr")
        other = sorted(k for k in made if made[k] != wanted.get(k))
        hold(made.keys() >= wanted.keys(), "lost", sorted(wanted.keys() - made.keys())[:5])
        hold(not other, "different", other[:5])
        if self.verifies:
            self.answer("verify")

    def check_writers(self) -> None:
        """No run begins a task once another has, but for leases that workers were doing already."""
        runs: dict[str, list[float]] = {}
        for line in self.log.read_bytes().decode().splitlines() if self.log.exists() else ():
            words = line.split()
            if len(words) == 5 and words[0] == "begin":
                runs.setdefault(words[4], []).append(float(words[3]))
        spans = sorted((min(at), max(at), run) for run, at in runs.items())
        for (_, last, run), (first, _, successor) in itertools.pairwise(spans):
            hold(last < first + 2 * LEASE_S, "two writers", f"{run} went on after {successor} had begun")

    def seen_and_mended(self, words: str = "damaged") -> None:
        """verify tells of what was done to a finished target; what it asks to be done mends it."""
        with self.command("verify", str(self.yaml)) as process:
            code, said = self.end(process)
        hold(code in (1, 2), "unseen", said)
        hold(words in said, "wrong answer", said)
        if code == 1:
            self.answer("verify", "--requeue", want=(0, 1))
        self.run()


def _group(leader: int) -> list[str]:
    """The result has the command lines of the processes of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:80])
    return found


def contents(folder: Path) -> dict[str, str]:
    """What readers find there: each file's digest, without temporary and lock files that killed processes leave."""
    return {k: v for k, v in tree(folder).items() if ".emsr-part-" not in k and not k.endswith(".__lock")}


def undisturbed(folder: Path, source: Path | None, server: str = "", **more: Any) -> tuple[Path | str, dict[str, Any]]:
    """A run without faults puts `sr` and `sr.emsr` into `folder`.

    The result is its source (a made one without `source`, below `server` where that serves `folder`) and the keys of
    its volume.yaml, with `more` of them.
    """
    keys: dict[str, Any] = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]} | more
    if source is None:
        source = write_lr(folder / "lr.zarr", texture(SHAPE))
    else:
        bounds = open_source(SourceConfig(url=source.as_uri())).info.bounds
        size = bounds.shape.minimum(MAX_SHAPE)
        start = bounds.start + (bounds.shape - size) // 2
        keys = {"source__box": {"start": list(start), "stop": list(start + size)}} | keys
    where: Path | str = f"{server}/lr.zarr" if server else source
    path = volume_yaml(folder / "v.yaml", where, folder / "sr", **keys)
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}"}
    subprocess.run(
        [sys.executable, str(TESTS / "run_faults.py"), "here", str(path)], cwd=REPOSITORY, env=environ, check=True
    )
    return where, keys
