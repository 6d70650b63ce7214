"""verify sees all that can rot beside and in a target, and a run mends what verify has found."""

# ruff: noqa: F811 - `address` is a fixture of another file

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GUARD_S, REPOSITORY, run_here, texture, tree, volume_yaml, write_lr
from test_standing_cluster import address  # noqa: F401

from pipeline import run, status, verify
from pipeline.base.errors import ClusterError
from pipeline.config import volume as configuration
from pipeline.plan.receipt import PENDING, WRITTEN, Receipt
from pipeline.prepare.prepare import prepare
from pipeline.prepare.prepared import Prepared
from pipeline.storage import ledger as ledger_module
from pipeline.storage.ledger import Ledger
from pipeline.storage.targets.open import open_target
from pipeline.storage.targets.task_objects import object_keys
from pipeline.worker import stored as stored_module
from pipeline.worker.stored import ReadLease, view

SHAPE = (6, 72, 64)
TARGETS = {
    "ome-zarr": {},
    "precomputed": {"target__format": "precomputed", "target__shard_shape": None},
    "precomputed, sharded": {"target__format": "precomputed"},
}
FOUND = "verified     18 of 18 written tasks, "


@pytest.fixture(autouse=True)
def many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tick of a ledger publishes a segment, and every fourth of them a snapshot."""
    monkeypatch.setattr(ledger_module, "FLUSH_S", 0.0)
    monkeypatch.setattr(ledger_module, "SNAPSHOT_EVERY", 4)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and a mask that leaves a quarter of it out."""
    folder = tmp_path_factory.mktemp("source")
    write_lr(folder / "lr.zarr", texture(SHAPE))
    mask = np.ones((6, 18, 16), np.uint8)
    mask[:, :8, 8:] = 0
    write_lr(folder / "mask.zarr", mask, (45.0, 128.0, 128.0))
    return folder


def finished(tmp_path: Path, **keys: object) -> Path:
    """A volume of 12 slabs and 6 blocks, written by this process."""
    write_lr(tmp_path / "lr.zarr", texture(SHAPE))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys)
    run_here(path)
    return path


def files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def delete(victim: Path, rng: random.Random) -> None:
    victim.unlink()


def cut(victim: Path, rng: random.Random) -> None:
    value = victim.read_bytes()
    victim.write_bytes(value[: rng.randrange(max(1, len(value)))])


def zero(victim: Path, rng: random.Random) -> None:
    victim.write_bytes(bytes(victim.stat().st_size))


def flip(victim: Path, rng: random.Random) -> None:
    value = bytearray(victim.read_bytes())
    if value:
        value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
    victim.write_bytes(value)


def extend(victim: Path, rng: random.Random) -> None:
    victim.write_bytes(victim.read_bytes() + rng.randbytes(rng.randint(1, 40)))


def swap(victim: Path, rng: random.Random) -> None:
    """Two objects of one kind with each other's bytes."""
    place = next(folder for folder in victim.parents if folder.name in ("sr", "sr.emsr"))
    kind = victim.name.split("-")[0] if place.name == "sr.emsr" else ""
    mate = rng.choice([f for f in files(place) if f.suffix == victim.suffix and f.name.startswith(kind)])
    mine, theirs = victim.read_bytes(), mate.read_bytes()
    victim.write_bytes(theirs)
    mate.write_bytes(mine)


ROT = [delete, cut, zero, flip, extend, swap]


@pytest.fixture(scope="module")
def whole(masked: Path, address: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished target of each kind, with its sidecar, as the main job on a standing cluster leaves it."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "FLUSH_S", 0.0)
        patch.setattr(ledger_module, "SNAPSHOT_EVERY", 4)
        for kind in TARGETS:
            folders[kind] = tmp_path_factory.mktemp("whole")
            assert run.main([str(yaml_for(folders[kind], masked, kind, address))]) == 0
    return folders


def book_of(prepared: Prepared) -> Ledger:
    """The ledger as it is stored."""
    book = Ledger(prepared.store, prepared.job.digest, prepared.job.plan.tasks, "test")
    book.load()
    return book


def yaml_for(folder: Path, masked: Path, kind: str, address: str) -> Path:
    mask = {"url": str(masked / "mask.zarr")}
    cluster = {"kind": "address", "address": address}
    keys = TARGETS[kind] | {"source__mask": mask, "cluster": cluster}
    return volume_yaml(folder / "v.yaml", masked / "lr.zarr", folder / "sr", **keys)


def seeds() -> list[object]:
    return [seed if seed < 15 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(150)]


@pytest.mark.parametrize("seed", seeds())
def test_any_rot_is_seen_or_harmless_and_a_run_mends_it(
    seed: int,
    whole: dict[str, Path],
    masked: Path,
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Any object of target and sidecar is lost, cut off, zeroed, flipped, extended or swapped, up to four of them."""
    rng = random.Random(seed)
    kind = rng.choice(sorted(TARGETS))
    for name in ("sr", "sr.emsr"):
        shutil.copytree(whole[kind] / name, tmp_path / name)
    path = yaml_for(tmp_path, masked, kind, address)
    good = tree(tmp_path / "sr")
    done = []
    for _ in range(rng.randint(1, 4)):
        ledger_too = rng.random() < 0.5
        # The lock is held by tests of its own: an unreadable one counts as held for a while.
        victims = [f for f in files(tmp_path / ("sr.emsr" if ledger_too else "sr")) if f.name != "lock.json"]
        victim, rot = rng.choice(victims), rng.choice(ROT)
        rot(victim, rng)
        done.append(f"{rot.__name__} {victim.relative_to(tmp_path)}")
    code = verify.main([str(path)])
    assert code == (0 if code == 0 and tree(tmp_path / "sr") == good else 1), done
    counts = capsys.readouterr().out
    if code:
        assert verify.main([str(path), "--requeue"]) == 1, (done, counts)
    assert run.main([str(path)]) == 0, (done, capsys.readouterr())
    assert verify.main([str(path)]) == 0, (done, capsys.readouterr().out)
    assert tree(tmp_path / "sr") == good, done


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("rot", [delete, cut, zero, flip, extend])
def test_each_metadata_object_is_compared_and_written_again(
    kind: str,
    rot: Callable[[Path, random.Random], None],
    whole: dict[str, Path],
    masked: Path,
    address: str,
    tmp_path: Path,
) -> None:
    """A run does so although no task is left; it computes nothing for it."""
    for name in ("sr", "sr.emsr"):
        shutil.copytree(whole[kind] / name, tmp_path / name)
    path = yaml_for(tmp_path, masked, kind, address)
    good = tree(tmp_path / "sr")
    for key in open_target(prepare(configuration.load(path)).job.target).metadata():
        rot(tmp_path / "sr" / key, random.Random(1))
        assert verify.main([str(path)]) == 1, key
    assert run.main([str(path)]) == 0
    assert json.loads((tmp_path / "sr.emsr" / "report.json").read_text())["this_run"]["written"] == 0
    assert tree(tmp_path / "sr") == good
    assert verify.main([str(path)]) == 0


def test_a_segment_lost_behind_a_snapshot_leaves_its_tasks_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """status counts them as written, and so does verify: without a checksum nothing says what they should be."""
    monkeypatch.setattr(ledger_module, "SNAPSHOT_EVERY", 1)
    path = finished(tmp_path)
    for segment in (tmp_path / "sr.emsr").rglob("segment-*"):
        segment.unlink()
    assert status.main([str(path)]) == 0
    assert verify.main([str(path)]) == 1
    assert FOUND + "18 damaged" in capsys.readouterr().out
    assert verify.main([str(path), "--requeue"]) == 1
    assert status.main([str(path)]) == 1
    assert "18 pending" in capsys.readouterr().out


def test_levels_averaged_from_what_had_rotted_are_made_again(tmp_path: Path, address: str) -> None:
    """A shard is mended only after the second pass has read it: the levels that were averaged from it are stale."""
    write_lr(tmp_path / "lr.zarr", texture(SHAPE))
    keys = {"target__encoding": "raw", "cluster": {"kind": "address", "address": address}}
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys)
    assert run.main([str(path)]) == 0
    good = tree(tmp_path / "sr")
    job = prepare(configuration.load(path)).job
    assert job.plan.second_pass
    finer = job.plan.second_pass.start - 1
    shard = next(f for f in files(tmp_path / "sr" / str(finer) / "c"))
    flip_voxels(shard)
    book = book_of(prepare(configuration.load(path)))
    blocks = range(job.plan.slabs, job.plan.tasks)
    book.record(Receipt(i, 0) for i in blocks)
    book.flush()
    assert run.main([str(path)]) == 0, "the second pass reads what has rotted"
    assert tree(tmp_path / "sr") != good
    assert verify.main([str(path), "--requeue"]) == 1
    assert run.main([str(path)]) == 0
    assert tree(tmp_path / "sr") == good
    assert verify.main([str(path)]) == 0


def test_a_task_whose_record_is_lost_takes_the_levels_made_of_it_along(tmp_path: Path, address: str) -> None:
    """The same where no verify has come between: the record of a slab is lost, and with it what its bytes were."""
    write_lr(tmp_path / "lr.zarr", texture(SHAPE))
    keys = {"target__encoding": "raw", "cluster": {"kind": "address", "address": address}}
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys)
    assert run.main([str(path)]) == 0
    good = tree(tmp_path / "sr")
    prepared = prepare(configuration.load(path))
    plan = prepared.job.plan
    coarser = plan.averaged_from(0)
    flip_voxels(tmp_path / "sr" / object_keys(open_target(prepared.job.target), plan, coarser[0])[0])
    book = book_of(prepared)
    book.record([Receipt(0, 0)])
    book.flush()
    assert run.main([str(path)]) == 0
    assert tree(tmp_path / "sr") == good


def flip_voxels(shard: Path) -> None:
    """Other voxels in the first chunk of a raw shard, which can be read as well as before."""
    value = bytearray(shard.read_bytes())
    value[100:200] = bytes(255 - b for b in value[100:200])
    shard.write_bytes(value)


def test_extra_objects_are_told_and_those_of_skipped_tasks_are_wrong(
    whole: dict[str, Path],
    masked: Path,
    address: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing reads other people's files; what lies where a slab was skipped is shown to everybody."""
    for kind in TARGETS:
        folder = tmp_path / kind
        for name in ("sr", "sr.emsr"):
            shutil.copytree(whole[kind] / name, folder / name)
        path = yaml_for(folder, masked, kind, address)
        (folder / "sr" / "notes.txt").write_text("mine")
        assert verify.main([str(path)]) == 0
        out = capsys.readouterr().out
        assert "extra        notes.txt" in out
        assert out.count("extra ") == 1
        prepared = prepare(configuration.load(path))
        book = book_of(prepared)
        task = next(book.indices(2))
        key = object_keys(open_target(prepared.job.target), prepared.job.plan, task)[0]
        (folder / "sr" / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / "sr" / key).write_bytes(b"old")
        assert verify.main([str(path)]) == 1
        assert f"{key}: task {task} was skipped" in capsys.readouterr().out


@pytest.mark.parametrize("kind", TARGETS)
def test_every_key_leads_back_to_its_task(kind: str, tmp_path: Path) -> None:
    """Of every object of every level: which shard it is, by its key alone."""
    write_lr(tmp_path / "lr.zarr", texture(SHAPE))
    box = {"start": [1, 8, 16], "stop": [6, 72, 64]}
    for name, keys in {"whole": {}, "box": {"source__box": box}}.items():
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", name, **TARGETS[kind], **keys)
        job = prepare(configuration.load(path)).job
        target = open_target(job.target)
        for task in range(job.plan.tasks):
            for key in object_keys(target, job.plan, task):
                place = target.locate(key)
                assert place is not None, key
                assert job.plan.task_at(*place) == task
        assert all(
            target.locate(key) is None for key in ("x", "0/c/9/9/99", "0/c/0/0", "0/c/00/0/0", *target.metadata())
        )


def test_what_cannot_be_read_is_told_apart_from_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to itself: the file system answers with an error, for root too. Nothing is queued to be written again."""
    path = finished(tmp_path)
    shard = files(tmp_path / "sr" / "0" / "c")[0]
    value = shard.read_bytes()
    shard.unlink()
    shard.symlink_to(shard)
    assert verify.main([str(path), "--requeue"]) == 1
    out = capsys.readouterr().out
    assert "unreadable   task 0: " in out
    assert "0 damaged, 1 cannot be read" in out
    assert "0 pending" in out
    shard.unlink()
    shard.write_bytes(value)
    assert verify.main([str(path)]) == 0


def test_an_unfinished_target_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = finished(tmp_path)
    prepared = prepare(configuration.load(path))
    book = book_of(prepared)
    book.record([Receipt(i, 0) for i in (3, 4, prepared.job.plan.tasks - 1)])
    book.flush()
    assert verify.main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "0 damaged" in out
    assert "2 of 12 slabs" in out
    assert "blocks of mip" in out


def test_requeue_holds_the_lock_while_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended in between would have recorded tasks after what verify has loaded."""
    path = finished(tmp_path)
    files(tmp_path / "sr" / "0" / "c")[0].unlink()
    held = []
    load = Ledger.load

    def look(book: Ledger) -> None:
        lock = json.loads((tmp_path / "sr.emsr" / "lock.json").read_text())
        held.append(lock["run"] == book.run_id and not lock["released"])
        load(book)

    monkeypatch.setattr(Ledger, "load", look)
    assert verify.main([str(path), "--requeue"]) == 1
    assert held
    assert all(held)
    assert json.loads((tmp_path / "sr.emsr" / "lock.json").read_text())["released"]


def test_another_volume_in_the_targets_place_is_never_overwritten(
    tmp_path: Path,
    address: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two targets change places, beside the other's plan: refused, and not a byte changes."""
    cluster = {"kind": "address", "address": address}
    for kind, keys in TARGETS.items():
        folder = tmp_path / kind
        folder.mkdir()
        write_lr(folder / "lr.zarr", texture(SHAPE))
        first = volume_yaml(folder / "a.yaml", "lr.zarr", "a", cluster=cluster, **keys)
        run_here(first)
        run_here(volume_yaml(folder / "b.yaml", "lr.zarr", "b", cluster=cluster, network__name="nearest", **keys))
        (folder / "a").rename(folder / "c")
        (folder / "b").rename(folder / "a")
        before = tree(folder)
        assert run.main([str(first)]) == 2
        assert "another volume" in capsys.readouterr().err
        assert verify.main([str(first)]) == 1
        assert tree(folder) == before


def test_a_lost_plan_is_named_by_the_ledger_or_the_provenance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished(tmp_path)
    plan = tmp_path / "sr.emsr" / "plan.json"
    kept = plan.read_bytes()
    for value in (
        b"",
        kept[:-40],
        kept.replace(b'"bicubic"', b'"nearest"'),
        kept.replace(b'"tasks": 18', b'"tasks": 19'),
    ):
        plan.write_bytes(value)
        assert status.main([str(path)]) == 2
        assert verify.main([str(path)]) == 1
        out = capsys.readouterr().out
        assert "damaged      plan.json" in out
        assert FOUND + "0 damaged" in out
    plan.unlink()
    assert verify.main([str(path)]) == 1
    assert "plan.json: is missing" in capsys.readouterr().out
    other = volume_yaml(tmp_path / "other.yaml", "lr.zarr", "sr", network__name="nearest")
    assert run.main([str(other)]) == 2
    assert "Restore plan.json or the volume.yaml of the first run" in capsys.readouterr().err
    assert run.main([str(path)]) == 0
    assert plan.read_bytes() == kept


def test_a_sample_is_of_so_many_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished(tmp_path)
    for asked, looked in ((5, 5), (100, 18), (0, 0)):
        assert verify.main([str(path), "--sample", str(asked)]) == 0
        assert f"verified     {looked} of 18 written" in capsys.readouterr().out


def test_a_worker_that_sees_another_place_finds_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the target's mount everything would be missing: the worker is told, not the target."""
    path = finished(tmp_path)
    prepared = prepare(configuration.load(path))
    segment = next((tmp_path / "sr.emsr").rglob("segment-*"))
    work = ReadLease(view(prepared.job, [str(segment.relative_to(tmp_path / "sr.emsr"))]), in_worker=False)
    receipts = work(prepared.job, 0, 3, math.inf).receipts
    assert [r.state for r in receipts] == [WRITTEN] * 3
    assert not any(r.error for r in receipts)
    for name in ("sr", "sr.emsr"):
        (tmp_path / name).rename(tmp_path / f"unmounted-{name}")
        with pytest.raises(ClusterError, match=socket.gethostname()):
            work(prepared.job, 0, 3, math.inf)
        (tmp_path / f"unmounted-{name}").rename(tmp_path / name)
    read = stored_module._found

    def unmount(*arguments: Any) -> Receipt:
        """The disk goes away between the look at the place and the look at the objects."""
        if (tmp_path / "sr").exists():
            (tmp_path / "sr").rename(tmp_path / "gone")
        return read(*arguments)

    monkeypatch.setattr(stored_module, "_found", unmount)
    with pytest.raises(ClusterError):
        work(prepared.job, 0, 3, math.inf)


def test_an_interrupted_verify_says_what_it_has_seen(tmp_path: Path) -> None:
    """Ctrl-C: the damage found so far is queued, the sum is of what was looked at, the lock is released."""
    path = finished(tmp_path)
    volume_yaml(path, "lr.zarr", "sr", work__requests_per_second={"read": 20})
    job = prepare(configuration.load(path)).job
    (tmp_path / "sr" / object_keys(open_target(job.target), job.plan, 0)[0]).unlink()
    words = [sys.executable, "-m", "pipeline.verify", str(path), "--requeue"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        while "damaged      task 0" not in said:
            assert process.poll() is None
            said += process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=GUARD_S)
    assert process.returncode == 130, errors
    assert '"event": "verify"' in errors
    assert "stopped" in errors
    looked = int(rest.partition("verified")[2].split()[0])
    assert 1 <= looked < 18
    assert json.loads((tmp_path / "sr.emsr" / "lock.json").read_text())["released"]
    book = book_of(prepare(configuration.load(path)))
    assert book.state(0) == PENDING
