"""Faults of the target's lock: several runs at once, and what dead or distant ones have left."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from fault_cluster import kill
from fault_scene import Scene, hold

OTHER_MACHINE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""The beginning of a command whose process numbers are of a world of their own, as on a machine of the same name."""


def two_clients(scene: Scene) -> None:
    """A second run is refused while the first lives, and takes over when it has been killed."""
    scene.write()
    halt = scene.folder / "hold"
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.5", STANDIN_HOLD=str(halt)) as first:
        scene.under_way(first)
        halt.touch()
        scene.run(2, "another run")
        hold(first.poll() is None, "wrong answer", "the first one ended too early for this test")
        when = time.monotonic()
        kill(first.pid)
        scene.end(first)
    scene.crash(when)


def two_runs_at_once(scene: Scene) -> None:
    """Two runs begin in the same moment: one gets the target, the other is refused or finds it complete."""
    scene.write()
    before = scene.rng.choice([[], OTHER_MACHINE])
    with (
        scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as first,
        scene.command("run", str(scene.yaml), before=before, STANDIN_DELAY_S="0.1") as second,
    ):
        codes = sorted(scene.end(process)[0] for process in (first, second))
    hold(codes[0] == 0 and codes[1] in (0, 2), "wrong answer", codes)


def suspended_client(scene: Scene) -> None:
    """A client stands still for longer than its lock is good for. A successor on another machine takes over, and the
    first one, when it goes on, writes nothing more.
    """
    scene.write()
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.3") as first:
        if not scene.under_way(first):
            return
        kill(first.pid, signal.SIGSTOP)
        began = len(scene.lines("begin"))
        with scene.command("run", str(scene.yaml), before=OTHER_MACHINE, STANDIN_DELAY_S="0.3") as second:
            scene.wait(lambda: len(scene.lines("begin")) > began + 8 or second.poll() is not None, "no successor")
            kill(first.pid, signal.SIGCONT)
            code, said = scene.end(second)
            hold(code == 0, "wrong answer", said)
        code, said = scene.end(first)
    hold(code in (0, 2), "wrong answer", f"{code}: {said}")


def unreadable_lock(scene: Scene) -> None:
    """The lock is cut off, zeroed or no lock at all: it counts as held. Removed by a person, it is free."""
    scene.interrupted()
    lock = _lock(scene)
    whole = lock.read_bytes()
    lock.write_bytes(
        scene.rng.choice(
            [b"", b"{}", b"[]", bytes(len(whole)), whole[: scene.rng.randrange(len(whole) - 1)], b"\xff\xfe"]
        )
    )
    scene.refused("lock")
    for part in lock.parent.glob("lock.json*"):
        part.unlink()
    scene.run()


def lock_of_a_dead_machine(scene: Scene) -> None:
    """A lock was left by a machine that is gone, whose clock was ahead, behind, or right: a run takes it over."""
    scene.interrupted()
    lock = _lock(scene)
    left = json.loads(lock.read_bytes()) | {
        "machine": "f" * 16,
        "host": scene.rng.choice(["elsewhere", json.loads(lock.read_bytes())["host"]]),
        "started": "1 ticks after boot elsewhere",
        "pid": scene.rng.randint(1, 99999),
        "released": False,
        "renewed": time.time() + scene.rng.choice([-86400, -120, 0, 120, 3600]),
    }
    lock.write_text(json.dumps(left))
    scene.run()


def left_lock_files(scene: Scene) -> None:
    """A killed process has left `KEY.__lock` files with bytes longer than what is written next."""
    scene.interrupted()
    wanted = [f.relative_to(scene.undisturbed) for f in (scene.undisturbed / "sr").rglob("*") if f.is_file()]
    for name in scene.rng.sample(wanted, min(6, len(wanted))):
        place = scene.folder / name.with_name(name.name + ".__lock")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(scene.rng.randbytes(1 << 20))
    (scene.folder / "sr.emsr" / "lock.json.__lock").write_bytes(scene.rng.randbytes(9999))
    scene.run()


def _lock(scene: Scene) -> Path:
    lock = scene.folder / "sr.emsr" / "lock.json"
    hold(lock.exists(), "lost", "the lock's file")
    return lock
