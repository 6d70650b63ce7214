"""Faults of the target's place: disks that take nothing, shards that rot, targets that move."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_scene import Scene, contents, hold


@contextlib.contextmanager
def _disk(scene: Scene, size: int) -> Iterator[Callable[[str], None]]:
    """The target lies on a tmpfs of its own; this yields a function that remounts it with other options."""
    place = scene.folder / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], check=True)
    scene.disk = place
    try:
        yield lambda options: scene.wait(
            lambda: (
                subprocess.run(["mount", "-o", f"remount,{options}", str(place)], stderr=subprocess.DEVNULL).returncode
                == 0
            ),
            "busy",
        )
        scene.check()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        scene.disk = None
        scene.write()
        shutil.copytree(scene.undisturbed / "sr", scene.folder / "sr", dirs_exist_ok=True)
        shutil.copytree(scene.undisturbed / "sr.emsr", scene.folder / "sr.emsr", dirs_exist_ok=True)


def full_disk(scene: Scene) -> None:
    """The target's disk fills up: the run ends with one message; with more space the next one goes on."""
    needed = sum(f.stat().st_size for f in (scene.undisturbed / "sr").rglob("*") if f.is_file())
    with _disk(scene, max(300_000, int(needed * scene.rng.uniform(0.3, 0.8)))) as remount:
        scene.write()
        scene.run(2, "no space left")
        remount(f"size={10 * needed + 10_000_000}")
        scene.crash(scene.last_ended())


def read_only(scene: Scene) -> None:
    """The target's disk becomes read-only under way: the run ends with one message; writable again, it goes on."""
    with _disk(scene, 1 << 30) as remount:
        scene.write()
        with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as client:
            if scene.under_way(client):
                remount("ro")
            code, said = scene.end(client)
        hold(code == 0 or (code == 2 and "read-only" in said.lower()), "wrong answer", said)
        remount("rw")
        scene.crash(scene.last_ended())


def disk_full_for_a_while(scene: Scene) -> None:
    """Something else fills the disk under way and goes away again."""
    with _disk(scene, 8 << 20):
        scene.write()
        ballast = scene.place.parent / "ballast"
        with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as client:
            if scene.under_way(client):
                with contextlib.suppress(OSError):
                    ballast.write_bytes(bytes(9 << 20))
            code, said = scene.end(client)
        hold(code == 0 or (code == 2 and "no space left" in said), "wrong answer", f"{code}: {said}")
        ballast.unlink(missing_ok=True)
        scene.crash(scene.last_ended())


def _flip(scene: Scene, victim: Path) -> None:
    data = bytearray(victim.read_bytes())
    data[scene.rng.randrange(len(data))] ^= 1 << scene.rng.randrange(8)
    victim.write_bytes(data)


def _cut(scene: Scene, victim: Path) -> None:
    victim.write_bytes(victim.read_bytes()[: scene.rng.randrange(victim.stat().st_size)])


def _zero(scene: Scene, victim: Path) -> None:
    victim.write_bytes(bytes(victim.stat().st_size))


def _extend(scene: Scene, victim: Path) -> None:
    victim.write_bytes(victim.read_bytes() + scene.rng.randbytes(scene.rng.randint(1, 64)))


def _lose(scene: Scene, victim: Path) -> None:
    victim.unlink()


def _swap(scene: Scene, victim: Path) -> None:
    mate = scene.rng.choice([f for f in _shards(scene) if f.read_bytes() != victim.read_bytes()])
    mine, theirs = victim.read_bytes(), mate.read_bytes()
    victim.write_bytes(theirs)
    mate.write_bytes(mine)


def _rotten_shards(rot: Callable[[Scene, Path], None]) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        finished(scene)
        for victim in scene.rng.sample(_shards(scene), scene.rng.randint(1, 3)):
            if victim.exists():
                rot(scene, victim)
        said = scene.answer("verify", "--requeue", want=(1,))
        damaged = {int(line.split()[2].rstrip(":")) for line in said.splitlines() if line.startswith("damaged")}
        hold(damaged, "unseen", said)
        mark = scene.log.stat().st_size if scene.log.exists() else 0
        scene.run()
        hold({task for task, _ in scene.lines("begin", mark)} <= damaged, "wrong answer", "others were done again")

    return fault


shard_flipped, shard_cut, shard_zeroed = _rotten_shards(_flip), _rotten_shards(_cut), _rotten_shards(_zero)
shard_extended, shard_lost, shard_swapped = _rotten_shards(_extend), _rotten_shards(_lose), _rotten_shards(_swap)


def shard_rots_under_way(scene: Scene) -> None:
    """A shard that a stopped run has written is damaged before the next run, which may average it: verify sees all of
    it, and what verify asks for mends it.
    """
    scene.own(target__encoding="raw")
    scene.interrupted()
    victims = _shards(scene)
    for victim in scene.rng.sample(victims, min(2, len(victims))):
        scene.rng.choice([_flip, _zero])(scene, victim)
    changed = contents(scene.place)
    code_words = scene.answer("run", want=(0, 1, 2))
    rotten = any(contents(scene.undisturbed / "sr").get(k) != v for k, v in changed.items() if "/c/" in f"/{k}")
    for _ in range(3):
        said = scene.answer("verify", "--requeue", want=(0, 1))
        if contents(scene.place) == contents(scene.undisturbed / "sr"):
            break
        hold("damaged " in said or "requeued" in said, "unseen", f"{code_words}{said}")
        scene.run()
    hold(not rotten or contents(scene.place) == contents(scene.undisturbed / "sr"), "different", "not mended")


def metadata_rots(scene: Scene) -> None:
    """A metadata file of the target is lost, cut off, zeroed or changed: verify sees it, and a run writes it again."""
    finished(scene)
    victim = scene.rng.choice(sorted(scene.place.rglob("zarr.json")))
    scene.rng.choice([_lose, _cut, _zero, _flip])(scene, victim)
    scene.seen_and_mended()


def target_moves(scene: Scene) -> None:
    """Target and sidecar are moved under another name between two runs, and target.url with them."""
    scene.interrupted()
    for name in ("sr", "sr.emsr"):
        (scene.folder / name).rename(scene.folder / f"moved-{name}")
    scene.name = "moved-sr"
    scene.write()
    scene.run()
    hold(not (scene.folder / "sr").exists(), "different", "the old place was written")


def sidecar_lost(scene: Scene) -> None:
    """What lies beside a target is gone: nothing is overwritten; put back, all is as it was."""
    finished(scene)
    aside = scene.folder / "sr.emsr"
    aside.rename(scene.folder / "kept")
    scene.refused("did not plan")
    shutil.rmtree(aside, ignore_errors=True)
    (scene.folder / "kept").rename(aside)


def another_plan(scene: Scene) -> None:
    """The same target with another volume.yaml is refused, and the first one goes on."""
    scene.interrupted()
    scene.write(
        **scene.rng.choice([{"network__scale": 16}, {"work__slab_shape": [2, 32, 16]}, {"target__encoding": "raw"}])
    )
    scene.refused("another plan")
    scene.write()
    scene.run()


def finished(scene: Scene) -> None:
    """The undisturbed target and its ledger are copied, as where a run has already been."""
    scene.write()
    for name in ("sr", "sr.emsr"):
        shutil.copytree(scene.undisturbed / name, scene.folder / name)


def _shards(scene: Scene) -> list[Path]:
    return [f for f in sorted(scene.place.rglob("*")) if f.is_file() and "c" in f.relative_to(scene.place).parts]
