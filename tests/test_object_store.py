"""The main job with source and target in an S3 emulator on this machine, and a source over plain HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest
import zarr
from conftest import main_job, texture, volume_yaml, write_lr
from moto.server import ThreadedMotoServer
from test_inference import whole_bicubic

from pipeline import status, verify
from pipeline.file_server import serving

VOXELS = texture((4, 48, 40))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    _, port = server.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def environ(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1"}
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    return values


def test_the_main_job_from_s3_to_s3(environ: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lr(tmp_path / "lr.zarr", VOXELS)
    client = boto3.client("s3")
    client.create_bucket(Bucket="brain")
    for file in (tmp_path / "lr.zarr").rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "brain", f"in/{file.relative_to(tmp_path / 'lr.zarr')}")
    path = volume_yaml(tmp_path / "v.yaml", "s3://brain/in", "s3://brain/out/sr")
    main_job(path, "run", **environ)
    assert status.main([str(path)]) == 0
    assert verify.main([str(path)]) == 0
    assert "is complete" in main_job(path, "run", **environ).stdout
    keys = [item["Key"] for page in client.get_paginator("list_objects_v2").paginate(Bucket="brain", Prefix="out/") for item in page["Contents"]]
    for key in keys:
        file = tmp_path / "copy" / key
        file.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("brain", key, str(file))
    sr = np.asarray(zarr.open_array(tmp_path / "copy" / "out" / "sr" / "0", mode="r"))
    assert np.abs(sr.astype(int) - whole_bicubic(VOXELS, 8)).max() <= 1
    assert "nothing" not in "".join((tmp_path / "copy" / key).read_text() for key in keys if key.endswith(".json")), "no credentials are kept"
    assert {"out/sr.emsr/plan.json", "out/sr.emsr/report.json", "out/sr.emsr/contact-sheet.png"} <= set(keys)


def test_a_bucket_that_is_not_there(environ: dict[str, str], tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", VOXELS)
    for source, target in (("s3://nowhere/in", "sr"), ("lr.zarr", "s3://nowhere/sr")):
        said = main_job(volume_yaml(tmp_path / "v.yaml", source, target), "run", check=False, **environ)
        assert said.returncode == 2, said.stderr
        assert "Traceback" not in said.stderr
        assert "nowhere" in said.stderr


def test_a_source_over_http(tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", VOXELS)
    with serving({"lr": tmp_path / "lr.zarr"}) as urls:
        main_job(volume_yaml(tmp_path / "v.yaml", urls["lr"], "sr"), "run", **dict(os.environ))
    sr = np.asarray(zarr.open_array(tmp_path / "sr" / "0", mode="r"))
    assert np.abs(sr.astype(int) - whole_bicubic(VOXELS, 8)).max() <= 1
