"""Faults of crews: workers that see other files or have other sources, and clusters that outlive a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from conftest import REPOSITORY, TESTS
from fault_cluster import cluster, own_mounts
from fault_scene import Scene, hold


def _bad_worker(begins: Callable[[Scene], list[str]]) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        scene.own()
        (scene.folder / "out").mkdir()
        scene.disk = scene.folder / "out"
        with cluster(scene, (begins(scene), {})) as (_, started):
            said = scene.run(STANDIN_DELAY_S="0.05")
            _named(scene, said)
            hold(started[0].poll() is None, "wrong answer", "the bad worker had ended by itself")

    return fault


worker_without_source = _bad_worker(lambda scene: own_mounts(f"mount -t tmpfs none {scene.folder}/own"))
worker_elsewhere = _bad_worker(lambda scene: own_mounts(f"mount -t tmpfs none {scene.folder}/out"))
worker_that_only_reads = _bad_worker(
    lambda scene: own_mounts(
        f"mount --bind {scene.folder}/out {scene.folder}/out && mount -o remount,ro,bind {scene.folder}/out"
    )
)
worker_with_a_full_disk = _bad_worker(
    lambda scene: own_mounts(
        f"mount -t tmpfs -o size=16k none {scene.folder}/out "
        f"&& {{ head -c 99999 /dev/zero > {scene.folder}/out/x; true; }}"
    )
)


def worker_of_another_commit(scene: Scene) -> None:
    """One worker's sources differ by a line that changes voxels: it does none of the work, and is named."""
    scene.write()
    other = scene.folder / "other"
    for package in ("emsr", "pipeline", "models"):
        shutil.copytree(REPOSITORY / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    changed = other / "pipeline" / "worker" / "slab.py"
    text = changed.read_text()
    changed.write_text(text.replace("    voxels = sr.size\n", "    sr[0] ^= 1\n    voxels = sr.size\n"))
    hold(changed.read_text() != text, "wrong answer", "the line to change is not there")
    with cluster(scene, ([], {"PYTHONPATH": f"{other}:{TESTS}"})):
        code, said = 0, scene.answer("run", want=(0, 2))
        hold("sources" in said or "set_aside" in said or "differ" in said, "wrong answer", f"{code}: {said}")
    if not scene.place.exists() or scene.recorded() != set():
        scene.write()
    scene.run()


def target_moves_on_a_standing_cluster(scene: Scene) -> None:
    """A cluster that stays has begun the target in another place, from where it was moved."""
    with cluster(scene):
        named = scene.yaml.read_text()
        scene.yaml.write_text(named.replace(str(scene.place), str(scene.folder / "old")))
        with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as client:
            scene.wait(lambda: (scene.folder / "old").exists() or client.poll() is not None, "no target")
            if scene.under_way(client):
                client.send_signal(signal.SIGTERM)
            code, said = scene.end(client)
        scene.was_asked_to_end(code, said)
        for end in ("", ".emsr"):
            (scene.folder / f"old{end}").rename(scene.folder / f"sr{end}")
        scene.yaml.write_text(named)
        scene.run()
        hold(not (scene.folder / "old").exists(), "lost", "the rest was written to the old place")


def two_jobs_on_a_standing_cluster(scene: Scene) -> None:
    """Workers that have done one job do another one, of another scale, right."""
    with cluster(scene):
        named = scene.yaml.read_text()
        other = named.replace(str(scene.place), str(scene.folder / "first")).replace("scale: 8", "scale: 16")
        scene.yaml.write_text(other)
        scene.run()
        scene.yaml.write_text(named)
        scene.run()


def _named(scene: Scene, said: str) -> None:
    report = json.loads(Path(f"{scene.place}.emsr", "report.json").read_text())
    hold(report.get("set_aside"), "wrong answer", f"no worker was named: {said}")


def may_mount() -> bool:
    return os.geteuid() == 0 and os.system("unshare -m true 2>/dev/null") == 0
