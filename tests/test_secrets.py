"""Passwords, signatures and tokens of urls: refused where they are read, and in no message or record."""

from __future__ import annotations

import shutil
import traceback
from pathlib import Path

import pytest
import yaml
from conftest import main_job, texture, volume_yaml, write_lr
from odd_servers import serving

from pipeline.base.errors import ConfigError, DamagedChunkError, TransientError, UserError
from pipeline.base.secrets import redacted
from pipeline.config import table, urls, volume
from pipeline.storage.kv import classify

SECRET = "hunter22"
LEAKY = [
    f"https://user:{SECRET}@host/v",
    f"https://{SECRET}@host/v",
    f"http://user:a@{SECRET}@host/v",
    f"s3://key:{SECRET}@bucket/v",
    f"s3+https://key:{SECRET}@host/bucket/v",
    f"s3://https://key:{SECRET}@host/bucket/v",
    f"zarr3://https://user:{SECRET}@host/v",
    f"precomputed://gs://{SECRET}@bucket/v",
    f"https://host/v?X-Amz-Signature={SECRET}",
    f"https://host/v?token={SECRET}#x",
    f"https://host/v#{SECRET}",
    f"ftp://user:{SECRET}@host/v",
    f"https://user:{SECRET}@host/v\n",
]


@pytest.mark.parametrize("url", LEAKY)
def test_a_url_with_a_secret_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(UserError) as caught:
        urls.normalise(url, Path("/"))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("where", ["source__url", "target__url", "source__mask__url", "network__weights"])
def test_in_every_key_of_volume_yaml(where: str, tmp_path: Path) -> None:
    path = volume_yaml(tmp_path / "v.yaml", "/in", "/out", **{where: f"https://me:{SECRET}@host/v.pth"})
    with pytest.raises(ConfigError, match=where.replace("__", r"\.") + ".*user's name or password") as caught:
        volume.load(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("key", ["sr", "gt", "lr", "mask"])
def test_in_every_key_of_table_yaml(key: str, tmp_path: Path) -> None:
    entry = {"name": "a", "sr": "/sr", "gt": "/gt", key: f"https://me:{SECRET}@host/v"}
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({"volumes": [entry], "output": "/out"}))
    with pytest.raises(ConfigError, match=f"volumes.0.{key}: .*user's name or password") as caught:
        table.load(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        f"Error reading https://me:{SECRET}@host/v/c/0: Forbidden",
        f"GET https://host/v?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET} HTTP/1.1",
        f"Authorization: AWS4-HMAC-SHA256 {SECRET}",
        f"proxy-authorization: Basic {SECRET}",
        f'{{"access_token": "{SECRET}", "client_secret": "{SECRET}"}}',
        f"connect to http://me:{SECRET}@proxy.lab.org:3128",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"<AWSAccessKeyId>{SECRET}</AWSAccessKeyId><Token-0>{SECRET}</Token-0>",
        f"location: https://cdn/v?sig={SECRET}#{SECRET}",
    ],
)
def test_what_a_library_says_is_told_without_it(text: str) -> None:
    assert SECRET not in redacted(text)
    for code in ("PERMISSION_DENIED", "UNAVAILABLE", "DATA_LOSS", "NOT_FOUND", "INTERNAL"):
        error = classify(ValueError(f"{code}: {text}"), f"https://me:{SECRET}@host/v")
        assert SECRET not in f"{error}"
        assert SECRET not in redacted("".join(traceback.format_exception(error)))
    for kind in (DamagedChunkError, TransientError, UserError):
        assert SECRET not in str(kind(text))


@pytest.mark.parametrize(
    "text",
    [
        "/data/em@lab/v.zarr has no voxel size. Wanted: one in nm.",
        "file:///data/em@lab/v.zarr at voxels (0, 0, 0)..(6, 20, 26)",
        "gs://bucket/src/info is absent: is it there?",
        "tcp://127.0.0.1:8786 gives no token; see token-1a2b",
        "what is the signature of the password",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


def test_no_record_of_a_run_has_what_a_store_echoed(tmp_path: Path) -> None:
    """A proxy that answers a chunk with the headers it was sent: screen, report and quarantine are without them."""
    write_lr(tmp_path / "lr.zarr", texture((4, 48, 40)))
    with serving(tmp_path) as server:
        one = min(file for file in (tmp_path / "lr.zarr" / "0" / "c").rglob("*") if file.is_file())
        server.absent = (400, f"Authorization: Bearer {SECRET} for https://me:{SECRET}@host/".encode())
        path = volume_yaml(tmp_path / "v.yaml", f"zarr3://{server.url}/lr.zarr", tmp_path / "sr", work__retries=0)
        shutil.move(one, tmp_path / "away")
        done = main_job(path, "run", check=False)
    assert done.returncode == 1
    written = [file for file in (tmp_path / "sr.emsr").rglob("*") if file.is_file()]
    assert any(b"400" in file.read_bytes() for file in written if file.parent.name == "quarantine")
    assert SECRET not in done.stdout + done.stderr
    assert not [file for file in written if SECRET.encode() in file.read_bytes()]
