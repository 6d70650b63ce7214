"""What a Kubernetes cluster would be asked for. None runs here: resources are data, deploy/ is held to the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, texture, tree, volume_yaml, wait_until, write_lr

from pipeline import run
from pipeline.base.errors import ClusterError
from pipeline.cluster import kubernetes
from pipeline.cluster import pods as watched
from pipeline.cluster.connect import slabs_in_flight
from pipeline.cluster.pods import PodWatch, fault, unplaced
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
    assert pods(spec(gpus_per_worker=1))[0]["containers"][0]["resources"]["limits"]["cpu"] == "3"
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
        kubernetes.manifest(loaded.cluster, slabs_in_flight(loaded))
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


def pod(name: str, component: str = "worker", **status: Any) -> dict[str, Any]:
    """What Kubernetes says of a pod."""
    return {"metadata": {"name": name, "labels": {"dask.org/component": component}}, "status": status}


def waits(reason: str, message: str = "", **last: Any) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, **({"message": message} if message else {})}}
    return {"phase": "Pending", "containerStatuses": [{"state": state, "lastState": last}]}


NO_NODE = {
    "phase": "Pending",
    "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes: no gpu"}
    ],
}
RUNS = {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}


def test_why_a_pod_does_not_start() -> None:
    assert fault(pod("a", **waits("ErrImagePull", "no such image"))) == "ErrImagePull: no such image"
    assert fault(pod("a", **waits("CreateContainerConfigError", 'secret "s" not found'))).endswith("not found")
    assert fault(pod("a", **waits("CrashLoopBackOff", terminated={"exitCode": 7}))) == (
        "CrashLoopBackOff: it ended with code 7"
    )
    assert fault(pod("a", phase="Failed", reason="Evicted", message="low on memory")) == "Evicted: low on memory"
    for well in (
        pod("a", **RUNS),
        pod("a", **waits("ContainerCreating")),
        pod("a", phase="Pending"),
        pod("a", **NO_NODE),
    ):
        assert not fault(well)
    assert unplaced(pod("a", **NO_NODE)) == "Unschedulable: 0/3 nodes: no gpu"
    assert not unplaced(pod("a", **RUNS))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_pods_that_do_not_start_are_told_and_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that cannot be pulled after five minutes, a node that is not there after an hour; one that crashes again
    and again runs in between; as long as one pod is well nothing ends.
    """
    clock = Clock()
    monkeypatch.setattr(watched, "time", clock)
    now: list[dict[str, Any]] = []
    watch = PodWatch(lambda: now)

    def after(seconds: float, *found: dict[str, Any]) -> None:
        now[:] = found
        for _ in range(int(seconds // 5)):
            clock.now += 5
            watch.look()

    scheduler, pull = pod("s", "scheduler", **RUNS), pod("w", **waits("ImagePullBackOff", "not found"))
    after(250, scheduler, pull)
    assert str(watch) == "pod w: ImagePullBackOff: not found"
    watch.refuse()
    after(5, scheduler, pod("w", **RUNS))
    after(60, scheduler, pull)
    with pytest.raises(ClusterError, match=r"pods do not start .*ImagePullBackOff"):
        watch.refuse()
    after(70, scheduler, pod("w", **RUNS))
    assert not str(watch)
    watch.refuse()
    after(1000, scheduler, pull, pod("v", **RUNS))
    watch.refuse()
    after(3000, scheduler, pod("w", **NO_NODE))
    watch.refuse()
    after(700, scheduler, pod("w", **NO_NODE))
    with pytest.raises(ClusterError, match="Unschedulable"):
        watch.refuse()


def test_a_kubernetes_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_S", 0.01)

    def refuses() -> list[dict[str, Any]]:
        raise ConnectionError("no route")

    with PodWatch(refuses) as watch:
        wait_until(lambda: "does not answer (ConnectionError: no route)" in str(watch))
