"""Faults of what a run records: segments, snapshots, the plan, reasons of quarantine, an interrupted verify."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from fault_scene import Scene, contents, hold
from fault_storage import finished


def segment_damaged(scene: Scene) -> None:
    """A segment of the ledger is changed or lost: its tasks are made again, to the same bytes."""
    finished(scene)
    victim = scene.rng.choice(_of(scene, "segment-"))
    _rot(scene, victim)
    scene.run()


def segment_lost_behind_a_snapshot(scene: Scene) -> None:
    """The records of tasks are lost while a snapshot still calls them written: verify says so, a run mends it."""
    scene.write()
    scene.run(FAULT_FLUSH_S="0", FAULT_SNAPSHOT_EVERY="2")
    snapshots, segments = _of(scene, "snapshot-"), _of(scene, "segment-")
    hold(snapshots, "wrong answer", "no snapshot was made")
    _rot(scene, scene.rng.choice([s for s in segments if _number(s) <= _number(snapshots[-1])]))
    scene.seen_and_mended("")


def snapshot_damaged(scene: Scene) -> None:
    """A snapshot is changed or lost: an older one and the segments tell the same."""
    scene.write()
    scene.run(FAULT_FLUSH_S="0", FAULT_SNAPSHOT_EVERY="2")
    for victim in scene.rng.sample(_of(scene, "snapshot-"), 1):
        _rot(scene, victim)
    mark = scene.log.stat().st_size
    scene.run()
    hold(not scene.lines("begin", mark), "lost", "tasks that segments record were done again")


def snapshots_lost(scene: Scene) -> None:
    """All snapshots are lost, between two runs."""
    scene.write()
    with scene.command(
        "run", str(scene.yaml), STANDIN_DELAY_S="0.1", FAULT_FLUSH_S="0", FAULT_SNAPSHOT_EVERY="2"
    ) as process:
        if scene.under_way(process):
            process.send_signal(signal.SIGTERM)
        scene.end(process)
    for victim in _of(scene, "snapshot-"):
        victim.unlink()
    scene.crash(scene.last_ended())


def plan_damaged(scene: Scene) -> None:
    """plan.json is lost, cut off or zeroed: it is rebuilt, or said to be missing; put back, all is as it was."""
    finished(scene)
    plan = scene.folder / "sr.emsr" / "plan.json"
    whole, before = plan.read_bytes(), contents(scene.place)
    if scene.rng.random() < 0.4:
        plan.unlink()
    else:
        plan.write_bytes(scene.rng.choice([b"", bytes(len(whole)), whole[: scene.rng.randrange(len(whole) - 2)]]))
    with scene.command("verify", str(scene.yaml)) as process:
        code, said = scene.end(process)
    hold(code in (1, 2) and "plan" in said, "unseen", f"{code}: {said}")
    with scene.command("run", str(scene.yaml)) as process:
        code, said = scene.end(process)
    hold(code == 0 or (code == 2 and "plan" in said), "wrong answer", f"{code}: {said}")
    hold(contents(scene.place) == before, "different", "the target was changed")
    if code == 2:
        plan.write_bytes(whole)


def reasons_damaged(scene: Scene) -> None:
    """What is kept of a quarantined slab is lost or cut off: status and the next run do not mind."""
    scene.write(work__retries=0)
    task = str(scene.rng.randrange(4))
    scene.run(1, "this slab always fails", FAULT_TASK=task, FAULT_KIND="fail")
    for victim in (scene.folder / "sr.emsr").rglob("quarantine/*.json"):
        _rot(scene, victim)
    scene.answer("status", want=(1,))
    scene.run()


def verify_killed(scene: Scene) -> None:
    """verify is killed while it reads, with --requeue or without: nothing is lost by it."""
    finished(scene)
    flags = scene.rng.choice([[], ["--requeue"]])
    with scene.command("verify", str(scene.yaml), *flags) as process:
        time.sleep(scene.rng.uniform(1, 6))
        process.send_signal(scene.rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        scene.end(process)
    scene.run()


def requeue_during_a_run(scene: Scene) -> None:
    """verify --requeue beside a run that lives is refused, or has nothing to say."""
    scene.write()
    halt = scene.folder / "hold"
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.2", STANDIN_HOLD=str(halt)) as client:
        if scene.under_way(client):
            halt.touch()
            for shard in [f for f in scene.place.rglob("c/*/*/*") if f.is_file()][:1]:
                shard.unlink()
            scene.answer("verify", "--requeue", want=(2,), words="another run")
            halt.unlink()
        scene.end(client)
    scene.answer("verify", "--requeue", want=(0, 1))
    scene.run()


def _of(scene: Scene, prefix: str) -> list[Path]:
    return sorted(f for f in (scene.folder / "sr.emsr").rglob(f"{prefix}*") if f.is_file())


def _number(path: Path) -> int:
    return int(path.name.split("-")[1])


def _rot(scene: Scene, victim: Path) -> None:
    data = bytearray(victim.read_bytes())
    kind = scene.rng.choice(["flip", "cut", "zero", "lose"])
    if kind == "flip":
        data[scene.rng.randrange(len(data))] ^= 1
    elif kind == "cut":
        data = data[: scene.rng.randrange(len(data))]
    elif kind == "zero":
        data = bytearray(len(data))
    victim.write_bytes(data)
    if kind == "lose":
        victim.unlink()
