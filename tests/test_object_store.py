"""The main job with source and target in an S3 emulator on this machine, and a source over plain HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import boto3
import fault_servers
import numpy as np
import pytest
import zarr
from conftest import REPOSITORY, main_job, run_here, texture, volume_yaml, wait_until, write_lr
from fault_servers import Gateway
from test_inference import whole_bicubic
from test_target_lock import check_race, lock_of

from pipeline import status, verify, view
from pipeline.base.errors import LedgerError, TransientError
from pipeline.plan.receipt import QUARANTINED, WRITTEN, Receipt
from pipeline.storage import ledger as ledger_module
from pipeline.storage import target_lock
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import KEY, TargetLock, holder
from pipeline.viewer.file_server import serving

VOXELS = texture((4, 48, 40))


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with fault_servers.s3() as gateway:
        yield gateway


@pytest.fixture
def environ(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = fault_servers.s3_environment(gateway)
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    return values


def test_the_main_job_from_s3_to_s3(
    gateway: Gateway, environ: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lr(tmp_path / "lr.zarr", VOXELS)
    client = boto3.client("s3")
    client.create_bucket(Bucket="brain")
    for file in (tmp_path / "lr.zarr").rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "brain", f"in/{file.relative_to(tmp_path / 'lr.zarr')}")
    path = volume_yaml(tmp_path / "v.yaml", "s3://brain/in", "s3://brain/out/sr")
    main_job(path, "run", **environ)
    run = list(gateway.seen)
    assert status.main([str(path)]) == 0
    assert verify.main([str(path)]) == 0
    assert "is complete" in main_job(path, "run", **environ).stdout
    assert view.main([str(path), "--state"]) == 0
    assert f"s3+http://{gateway.url.removeprefix('http://')}/brain/out/sr" in capsys.readouterr().out
    keys = [
        item["Key"]
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="brain", Prefix="out/")
        for item in page["Contents"]
    ]
    for key in keys:
        file = tmp_path / "copy" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("brain", key, str(file))
    sr = np.asarray(zarr.open_array(tmp_path / "copy" / "out" / "sr" / "0", mode="r"))
    assert np.abs(sr.astype(int) - whole_bicubic(VOXELS, 8)).max() <= 1
    assert "nothing" not in "".join((tmp_path / "copy" / key).read_text() for key in keys if key.endswith(".json")), (
        "no credentials are kept"
    )
    assert {"out/sr.emsr/plan.json", "out/sr.emsr/report.json", "out/sr.emsr/contact-sheet.png"} <= set(keys)

    # Every object is put once and whole, and the ledger adds little: 25 bytes a task, and the fixed objects of a run.
    size = sum(f.stat().st_size for f in (tmp_path / "copy" / "out" / "sr").rglob("*") if f.is_file())
    assert gateway.bytes_under("brain/out/sr/") == size
    ledger = sum(n for key, n in gateway.stored.items() if "/ledger-" in key)
    tasks = json.loads((tmp_path / "copy" / "out" / "sr.emsr" / "plan.json").read_text())["tasks"]
    assert 25 * tasks <= ledger <= 25 * tasks + 12 * sum("/segment-" in key for key in gateway.stored)
    shards = [n for n, line in enumerate(run) if line.startswith("PUT /brain/out/sr/") and "/c/" in line]
    assert not [line for line in run[shards[0] :] if "list-type" in line and "prefix=out/sr/" in unquote(line)], (
        "the target is not listed while slabs are written"
    )
    own = [line for line in run if not (line.startswith("DELETE ") and "sr.emsr/token-" in line)]
    assert {line.split()[0] for line in own} <= {"GET", "PUT", "HEAD"}, "only tokens are deleted, nothing is renamed"


def test_records_wait_for_a_store_that_is_away(
    gateway: Gateway, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "FLUSH_S", 0.0)
    boto3.client("s3").create_bucket(Bucket="away")
    store = Store("s3://away/sr.emsr")
    book = Ledger(store, "d" * 64, 4, "r")
    gateway.share, gateway.silence_s = 1.0, 0.0
    try:
        book.record([Receipt(2, WRITTEN, 7, 100), Receipt(3, QUARANTINED, error="why")])
        book.tick()
        assert book.counts()["written"] == 1
        monkeypatch.setattr(ledger_module, "PATIENCE_S", -1.0)
        with pytest.raises(TransientError):
            book.tick()
    finally:
        gateway.share, gateway.silence_s = 0.0, 4.0
    book.tick()
    again = Ledger(store, "d" * 64, 4, "s")
    again.load()
    assert again.counts() == {"pending": 2, "written": 1, "skipped": 0, "quarantined": 1}
    assert again.why(3).first_line == "why"


def test_a_lock_whose_answer_was_lost_is_held(
    gateway: Gateway, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conditional write was carried out, its answer cut off: the retry finds the object changed, by ourselves."""
    boto3.client("s3").create_bucket(Bucket="lost")
    store = Store("s3://lost/sr.emsr")
    held = TargetLock(store, "ours")
    held.refuse_others()
    answers = iter([("", True), ("cut", True)])  # the lock is read, then written
    monkeypatch.setattr(gateway, "fault", lambda: next(answers, ("", True)))
    held.acquire()
    try:
        assert holder(store)["run"] == "ours"
    finally:
        held.release()


def test_of_several_runs_in_the_same_millisecond_one_gets_each_target(environ: dict[str, str]) -> None:
    boto3.client("s3").create_bucket(Bucket="race")
    check_race("s3://race")


def test_the_lock_of_another_machine_is_watched_and_taken_over(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3.client("s3").create_bucket(Bucket="watched")
    store, messages = Store("s3://watched/sr.emsr"), list[str]()
    store.put(KEY, lock_of(1))
    monkeypatch.setattr(target_lock, "LOOK_S", 0.05)
    with pytest.raises(LedgerError, match="renewed its lock just now"):
        TargetLock(store, "early", lambda text: store.put(KEY, lock_of(1))).acquire()
    monkeypatch.setattr(target_lock, "WATCH_S", 1.0)
    lock = TargetLock(store, "next", messages.append)
    lock.acquire()
    assert "it is dead" in messages[-1]
    store.put(KEY, lock_of(1))
    assert not lock._write(lock._generation), "a renewal does not take back what another run has taken"
    lock.lost.set()
    lock.release()


def test_the_main_job_on_gcs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Main job, ledger, lock, resume, verify, view; the gateway adds the conditional writes the emulator lacks."""
    pytest.importorskip("gcp_storage_emulator")
    write_lr(tmp_path / "lr.zarr", VOXELS)
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "gs://brain/out/sr")
    here = volume_yaml(tmp_path / "here.yaml", "lr.zarr", "sr")
    with fault_servers.gcs("brain") as gateway:
        environ = fault_servers.gcs_environment(gateway)
        main_job(path, "run", **environ)
        run_here(here)
        assert gateway.bytes_under("brain/out/sr/") == sum(
            f.stat().st_size for f in (tmp_path / "sr").rglob("*") if f.is_file()
        )
        assert "is complete" in main_job(path, "run", **environ).stdout
        # tensorstore reads the emulator's address once a process.
        for command, words in {"status": "0 pending", "verify": "0 damaged", "view": "gs://brain/out/sr"}.items():
            flags = ["--state"] if command == "view" else []
            said = subprocess.run(
                [sys.executable, "-m", f"pipeline.{command}", str(path), *flags],
                env={**os.environ, **environ},
                cwd=REPOSITORY,
                capture_output=True,
                text=True,
            )
            assert said.returncode == 0, said.stderr
            assert words in said.stdout
        lock = subprocess.run(
            [sys.executable, "-c", LEASE], env={**os.environ, **environ}, cwd=REPOSITORY, capture_output=True, text=True
        )
        assert lock.returncode == 0, lock.stderr


LEASE = """
from pipeline.storage.kv import Store
store = Store("gs://brain/lock")
assert store.get_with_generation("lock.json")[0] is None
free = store.get_with_generation("lock.json")[1]
assert store.put_if("lock.json", b"a", free), "the first one takes it"
assert not store.put_if("lock.json", b"b", free), "the second one is too late"
value, generation = store.get_with_generation("lock.json")
assert value == b"a"
assert store.put_if("lock.json", b"c", generation)
assert store.get("lock.json") == b"c"
"""


def test_a_bucket_that_is_not_there(environ: dict[str, str], tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", VOXELS)
    for source, target in (("s3://nowhere/in", "sr"), ("lr.zarr", "s3://nowhere/sr")):
        said = main_job(volume_yaml(tmp_path / "v.yaml", source, target), "run", check=False, **environ)
        assert said.returncode == 2, said.stderr
        assert "Traceback" not in said.stderr
        assert "nowhere" in said.stderr


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[str]:
    """A plain nginx that serves `folder`; yields its address. Skips where it is not installed."""
    binary = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if binary is None:
        pytest.skip("nginx is not installed")
    place = folder / "nginx"
    place.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary = " ".join(
        f"{kind}_temp_path {place}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (place / "nginx.conf").write_text(
        f"daemon off; user root; pid {place}/pid; error_log {place}/error.log; events {{}} "
        f"http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
    )
    with subprocess.Popen(
        [binary, "-c", str(place / "nginx.conf"), "-e", str(place / "error.log")], stderr=subprocess.DEVNULL
    ) as server:
        try:
            wait_until(lambda: listens(port), "nginx does not start")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.mark.parametrize("server", ["ours", "nginx"])
def test_a_source_over_http(server: str, tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", VOXELS)
    with contextlib.ExitStack() as stack:
        url = (
            f"{stack.enter_context(nginx(tmp_path))}/lr.zarr"
            if server == "nginx"
            else stack.enter_context(serving({"lr": tmp_path / "lr.zarr"}))["lr"]
        )
        main_job(volume_yaml(tmp_path / "v.yaml", url, "sr"), "run", **dict(os.environ))
    sr = np.asarray(zarr.open_array(tmp_path / "sr" / "0", mode="r"))
    assert np.abs(sr.astype(int) - whole_bicubic(VOXELS, 8)).max() <= 1
