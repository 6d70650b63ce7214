"""Several hosts: scheduler, worker and S3 server in network namespaces, and a cable that is pulled for a minute."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, texture, tree, volume_yaml, wait_until, write_lr

NET = "10.213.77"
CUT_S = 60
"""Longer than Dask's own 30 s, after which it would give the connection up."""


def ip(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=check)


@pytest.fixture
def hosts() -> Iterator[dict[str, list[str]]]:
    """Name of a host -> what to put before a command that is to run there; "cable": the worker's, at the bridge.

    This machine is NET.1.
    """
    if shutil.which("ip") is None:
        pytest.skip("no iproute2 here")
    mark = f"{os.getpid() % 10**6:x}"
    if (tried := ip("netns", "add", f"emsr-{mark}", check=False)).returncode:
        pytest.skip(f"network namespaces are not permitted here: {tried.stderr.strip()}")
    ip("netns", "delete", f"emsr-{mark}")
    bridge = f"br{mark}"
    with contextlib.ExitStack() as stack:
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "delete", bridge)
        ip("address", "add", f"{NET}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        found = {}
        for number, host in enumerate(("scheduler", "worker", "store"), 2):
            space, outer = f"{host}-{mark}", f"v{number}{mark}"
            ip("netns", "add", space)
            stack.callback(ip, "netns", "delete", space)
            ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", outer, "master", bridge, "up")
            ip("-n", space, "address", "add", f"{NET}.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
            found[host] = ["ip", "netns", "exec", space]
            if host == "worker":
                found["cable"] = [outer]
        yield found


def listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False


@contextlib.contextmanager
def running(command: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_cable_pulled_for_a_minute(
    hosts: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker loses scheduler and store in the middle of the run; with the cable back the same run ends.

    It ends with the bytes of a local run.
    """
    small = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}
    write_lr(tmp_path / "lr.zarr", texture((6, 40, 32)))
    main_job(volume_yaml(tmp_path / "local.yaml", "lr.zarr", "undisturbed", **small))
    aws = {
        "AWS_ENDPOINT_URL": f"http://{NET}.4:5000",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for key, value in aws.items():
        monkeypatch.setenv(key, value)
    environ = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
        "STANDIN_DELAY_S": "0.1",
        "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "300s",
    }
    dask, standin = [sys.executable, "-m", "dask"], str(TESTS / "run_standin.py")
    start_worker = [
        *dask,
        "worker",
        f"tcp://{NET}.2:8786",
        "--nthreads",
        "2",
        "--no-nanny",
        "--no-dashboard",
        "--preload",
        standin,
    ]
    with (
        running([*hosts["store"], sys.executable, "-m", "moto.server", "-H", f"{NET}.4", "-p", "5000"], environ),
        running([*hosts["scheduler"], *dask, "scheduler", "--host", f"{NET}.2", "--no-dashboard"], environ),
        running([*hosts["worker"], *start_worker], environ) as worker,
    ):
        s3 = boto3.client("s3")
        wait_until(lambda: listens(f"{NET}.4", 5000), "the S3 server does not start")
        s3.create_bucket(Bucket="brain")
        for file in (tmp_path / "lr.zarr").rglob("*"):
            if file.is_file():
                s3.upload_file(str(file), "brain", f"in/{file.relative_to(tmp_path / 'lr.zarr')}")
        there = {"kind": "address", "address": f"tcp://{NET}.2:8786"}
        path = volume_yaml(tmp_path / "v.yaml", "s3://brain/in", "s3://brain/sr", cluster=there, **small)

        def objects(prefix: str) -> list[str]:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket="brain", Prefix=prefix)
            return [item["Key"] for page in pages for item in page.get("Contents", [])]

        with subprocess.Popen(
            [sys.executable, standin, str(path)], env=environ, stderr=subprocess.PIPE, text=True
        ) as client:
            wait_until(lambda: len(objects("sr/0/c/")) > 3 or client.poll() is not None)
            ip("link", "set", *hosts["cable"], "down")
            before = len(objects("sr/"))
            time.sleep(CUT_S)
            assert len(objects("sr/")) <= before + 1, "the cable was not out"
            ip("link", "set", *hosts["cable"], "up")
            _, said = client.communicate(timeout=GUARD_S)
        assert client.returncode == 0, said
        assert '"quarantined": 0' in said
        assert worker.poll() is None, "the worker outlived it"
        for key in objects("sr/"):
            file = tmp_path / "copy" / key
            file.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file("brain", key, str(file))
    undisturbed, disturbed = tree(tmp_path / "undisturbed"), tree(tmp_path / "copy" / "sr")
    voxels = [name for name in undisturbed if "/c/" in name]
    assert len(voxels) > 12
    assert {name: disturbed.get(name) for name in voxels} == {name: undisturbed[name] for name in voxels}
    assert disturbed.keys() == undisturbed.keys()
