"""What a Kubernetes cluster would be asked for. None runs here: resources are data, deploy/ is held to the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, texture, tree, volume_yaml, write_lr

from pipeline import run
from pipeline.cluster import kubernetes
from pipeline.config import volume as config
from pipeline.config.cluster import ClusterConfig

FILES = REPOSITORY / "deploy" / "kubernetes"
POD = {"image": "emsr:1", "memory": "8GiB"}


def spec(**changes: Any) -> dict[str, Any]:
    gpus = changes.pop("gpus_per_worker", None)
    return kubernetes.spec(ClusterConfig(kind="kubernetes", gpus_per_worker=gpus, kubernetes=POD | changes), 2, "name")[
        "spec"
    ]


def pods(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [made["worker"]["spec"], made["scheduler"]["spec"]]


def environ(pod: dict[str, Any]) -> dict[str, str]:
    return {v["name"]: v["value"] for v in pod["containers"][0]["env"]}


def test_no_pod_has_rights() -> None:
    for pod in pods(spec(secret="s", volume_claim="v", spot=True, gpus_per_worker=1)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_a_worker_asks_for_its_gpu_cores_and_memory() -> None:
    worker, scheduler = pods(spec(gpus_per_worker=1, cores=4))
    size = {"cpu": "4", "memory": str(8 * 2**30), "nvidia.com/gpu": "1"}
    assert worker["containers"][0]["resources"] == {"requests": size, "limits": size}
    assert worker["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    assert "nvidia.com/gpu" not in str(scheduler)
    without, _ = pods(spec(gpus_per_worker=0))
    assert environ(without)["CUDA_VISIBLE_DEVICES"] == ""
    assert without["containers"][0]["resources"]["limits"] == {"cpu": "2", "memory": str(8 * 2**30)}


def test_only_workers_run_on_spot_nodes() -> None:
    worker, scheduler = pods(spec(spot=True))
    assert {t["key"] for t in worker["tolerations"]} == set(kubernetes.SPOT)
    assert scheduler["tolerations"] == []


def test_secrets_are_mounted_read_only_and_stand_nowhere_in_the_resource() -> None:
    worker, scheduler = pods(spec(secret="mine"))
    assert "mine" not in str(scheduler)
    assert {"name": "credentials", "secret": {"secretName": "mine"}} in worker["volumes"]
    (mount,) = [m for m in worker["containers"][0]["volumeMounts"] if m["name"] == "credentials"]
    assert mount["readOnly"]
    assert environ(worker)["AWS_SHARED_CREDENTIALS_FILE"].startswith(mount["mountPath"])
    assert "credentials" not in str(pods(spec())[0])


def test_every_mount_has_its_volume() -> None:
    for pod in pods(spec(secret="s", volume_claim="v")):
        assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_manifest_in_deploy_is_what_the_code_makes() -> None:
    loaded = config.load(FILES / "volume.yaml")
    assert yaml.safe_load((FILES / "cluster.yaml").read_text()) == yaml.safe_load(
        kubernetes.manifest(loaded.cluster, loaded.work.in_flight)
    )


def test_the_client_in_deploy_is_as_unprivileged_and_of_the_same_image() -> None:
    pod = yaml.safe_load((FILES / "client.yaml").read_text())["spec"]["template"]["spec"]
    worker = yaml.safe_load((FILES / "cluster.yaml").read_text())["spec"]["worker"]["spec"]
    assert pod["securityContext"] == worker["securityContext"]
    assert pod["containers"][0]["securityContext"] == worker["containers"][0]["securityContext"]
    assert pod["containers"][0]["image"] == worker["containers"][0]["image"]
    assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_namespace_in_deploy_is_closed() -> None:
    found = {d["kind"]: d for d in yaml.safe_load_all((FILES / "namespace.yaml").read_text())}
    operator = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "dask-operator"}}}
    assert found["NetworkPolicy"]["spec"]["ingress"] == [{"from": [{"podSelector": {}}, operator]}]
    assert found["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]


def test_the_price_shows_the_resource_and_touches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster={"kind": "kubernetes", "kubernetes": POD})
    before = tree(tmp_path)
    assert run.main([str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out.split("each worker\n\n")[1]
    assert yaml.safe_load(shown)["kind"] == "DaskCluster"
    assert tree(tmp_path) == before
