"""How stores are asked: endpoints, whose credentials, who pays. Read off the requests that a server of ours gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import boto3
import fault_servers
import numpy as np
import pytest
import zarr
from conftest import main_job, texture, volume_yaml, write_lr
from fault_servers import Gateway
from odd_servers import OddServer, serving
from test_inference import whole_bicubic

from pipeline import status, verify, view
from pipeline.base.errors import ConfigError, SourceError, UserError
from pipeline.config import access, volume
from pipeline.config.access import AccessConfig, access_of
from pipeline.config.volume import SourceConfig
from pipeline.prepare.prepare import prepare
from pipeline.storage.kv import Store
from pipeline.storage.sources.open import open_source
from pipeline.worker.stored import view as view_of

VOXELS = texture((4, 48, 40))
CREDENTIALS = "[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = labsecret\n"


@pytest.fixture(scope="module")
def moto() -> Iterator[Gateway]:
    with fault_servers.s3() as gateway:
        yield gateway


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OddServer]:
    write_lr(tmp_path / "bucket" / "lr.zarr", VOXELS)
    with serving(tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def nothing_stated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials but a profile in a file, and no endpoint that answers."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "credentials").write_text(CREDENTIALS)
    (tmp_path / "config").write_text("")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(access, "_known", {})


def at(server: OddServer, path: str = "bucket/lr.zarr") -> str:
    return f"s3+{server.url}/{path}"


def signers(server: OddServer) -> set[str]:
    """Whose keys signed the requests; "" stands for nobody."""
    found = (re.search(r"Credential=(\w+)/", h.get("Authorization", h.get("authorization", ""))) for h in server.seen)
    return {match[1] if match else "" for match in found}


@pytest.mark.parametrize("spelling", ["s3+http://{}/bucket/lr.zarr", "s3://http://{}/bucket/lr.zarr"])
def test_the_url_names_the_endpoint(spelling: str, server: OddServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "envsecret")
    source = open_source(SourceConfig(url=spelling.format(server.url.removeprefix("http://"))))
    np.testing.assert_array_equal(source.read(source.info.bounds), VOXELS)
    assert source.info.url == at(server)
    assert signers(server) == {"ENVKEY"}


def test_each_volume_has_its_own_signer(server: OddServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVKEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "envsecret")
    for stated, signer in ((AccessConfig(anonymous=True), ""), (AccessConfig(profile="lab"), "LABKEY")):
        server.seen.clear()
        source = open_source(SourceConfig(url=at(server), access=stated))
        np.testing.assert_array_equal(source.read(source.info.bounds), VOXELS)
        assert signers(server) == {signer}
        server.seen.clear()
        Store(at(server, "bucket/other")).get("key")
        assert signers(server) == {"ENVKEY"}, "what lies elsewhere is asked as before"


def test_google_s_payer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as server:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        monkeypatch.setenv("GCE_METADATA_ROOT", server.url.removeprefix("http://"))
        access.use("gs://bucket/paid", AccessConfig(billing_project="lab-1"))
        Store("gs://bucket/paid").get("key")
        Store("gs://bucket/free").get("key")
        asked = [h for h in server.seen if "/o/" in h["path"]]
        assert ["lab-1" in json.dumps(h) for h in asked] == [True, False]


def test_google_s_refusal_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = b'{"error":{"code":400,"message":"Bucket is a requester pays bucket but no user project provided."}}'
    with serving(tmp_path) as server:
        server.absent = (400, said)
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
        monkeypatch.setenv("GCE_METADATA_ROOT", server.url.removeprefix("http://"))
        with pytest.raises(SourceError, match=r"access\.billing_project.*GOOGLE_CLOUD_QUOTA_PROJECT"):
            open_source(SourceConfig(url="gs://bucket/src"))


def test_amazon_s_refusal_names_the_keys(server: OddServer) -> None:
    server.denied = lambda path: True
    with pytest.raises(SourceError, match=r"access\.anonymous: true.*mount-s3 --requester-pays"):
        open_source(SourceConfig(url=at(server), access=AccessConfig(profile="lab")))


def test_a_profile_that_is_not_there(server: OddServer) -> None:
    with pytest.raises(UserError, match=r"access\.profile and AWS_SHARED_CREDENTIALS_FILE"):
        open_source(SourceConfig(url=at(server), access=AccessConfig(profile="nobody")))


def test_the_environment_speaks_where_nothing_is_stated() -> None:
    said = {"AWS_NO_SIGN_REQUEST": "yes", "AWS_REGION": "eu-1"}
    said |= {"GOOGLE_CLOUD_QUOTA_PROJECT": "p"}
    found = access_of("s3://b/v", said)
    assert (found.anonymous, found.region, found.billing_project) == (True, "eu-1", "p")
    access.use("zarr://s3://b/v", AccessConfig(profile="lab", region="us-2"))
    for url in ("s3://b/v", "s3://b/v/0", "s3://b/v.emsr", "s3://b/v.emsr/ledger-1"):
        found = access_of(url, said)
        assert (found.anonymous, found.profile, found.region) == (False, "lab", "us-2"), url
    assert access_of("s3://b/v2", {}) == AccessConfig()


@pytest.mark.parametrize(
    ("changes", "saw"),
    [
        ({"source__access__profile": "x"}, "source.access.profile is not for file://"),
        ({"target__access__anonymous": True}, "target.access.anonymous is not for file://"),
        ({"source__access": {"anonymous": True, "profile": "x"}}, "one of the two"),
        ({"source__url": "gs://b/v", "source__access__anonymous": True}, "source.access.anonymous is not for gs://"),
        ({"source__url": "s3://b/v", "source__access__billing_project": "x"}, "billing_project is not for s3://"),
        ({"source__url": "s3+https://host"}, "names no bucket"),
    ],
)
def test_refused_in_volume_yaml(changes: dict[str, object], saw: str, tmp_path: Path) -> None:
    path = volume_yaml(tmp_path / "v.yaml", "/in", "/out", **changes)
    with pytest.raises(ConfigError, match=re.escape(saw)):
        volume.load(path)


def test_an_endpoint_with_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://me:hunter22@minio.lab.org")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL holds") as caught:
        Store("s3://bucket/v")
    assert "hunter22" not in str(caught.value)


def test_a_public_source_and_a_private_target_at_another_endpoint(
    server: OddServer, moto: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole job, its workers too: what volume.yaml states goes with the job, not with the environment."""
    target = f"s3+{moto.url}/results/sr"
    client = boto3.client(
        "s3", endpoint_url=moto.url, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
    )
    client.create_bucket(Bucket="results")
    path = volume_yaml(
        tmp_path / "v.yaml",
        at(server),
        target,
        source__access={"anonymous": True},
        target__access={"profile": "lab", "region": "us-east-1"},
    )
    main_job(path, "run")
    assert signers(server) == {""}
    assert status.main([str(path)]) == 0
    assert verify.main([str(path)]) == 0
    job = prepare(volume.load(path)).job
    access._known.clear()  # as in a process of another machine that has only been given the job
    assert all(view_of(job, ["plan.json"]).sidecar.values())
    assert view.main([str(path), "--state"]) == 0
    shown = capsys.readouterr().out
    assert target in shown
    assert at(server) in shown
    for item in client.list_objects_v2(Bucket="results", Prefix="sr/")["Contents"]:
        file = tmp_path / "copy" / item["Key"]
        file.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("results", item["Key"], str(file))
    found = np.asarray(zarr.open_array(tmp_path / "copy" / "sr" / "0", mode="r"))
    assert np.abs(found.astype(int) - whole_bicubic(VOXELS, 8)).max() <= 1
