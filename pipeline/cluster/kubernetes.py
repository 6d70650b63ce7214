"""Workers as Kubernetes pods, through the dask-kubernetes operator: one pod, one worker process, at most one GPU."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from distributed import Client

from pipeline.base.errors import ClusterError, NoAnswerError
from pipeline.base.waits import closing, waiting
from pipeline.cluster.patient_client import PatientClient
from pipeline.cluster.pods import Pod, PodWatch
from pipeline.config.cluster import WORKER_ENVIRON, ClusterConfig

USER = 1000
"""The image's user: see Dockerfile."""

CREDENTIALS = "/var/run/secrets/emsr"

SPOT = (
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
    "node.kubernetes.io/spot",
    "eks.amazonaws.com/capacityType",
)
"""Taints by which providers and administrators keep ordinary pods from nodes that may be taken away."""


def spec(config: ClusterConfig, in_flight: int, name: str) -> dict[str, Any]:
    """The DaskCluster resource `name`: a scheduler, and a template of workers with `in_flight` threads each.

    It asks for no workers; `pods` adds them.
    """
    settings = config.kubernetes
    assert settings is not None
    gpu = {"nvidia.com/gpu": "1"} if config.gpus_per_worker else {}
    size = {"cpu": str(settings.cores or config.cores(in_flight)), "memory": str(settings.memory), **gpu}
    worker = _container(
        config,
        "worker",
        [
            "worker",
            "--name",
            "$(DASK_WORKER_NAME)",
            "--nthreads",
            str(in_flight),
            "--memory-limit",
            "0",
            "--no-dashboard",
        ],
    )
    worker["resources"] = {"requests": size, "limits": dict(size)}
    # 0.0.0.0 is the pod's own address; only its namespace's service leads there.
    scheduler = _container(config, "scheduler", ["scheduler", "--host", "0.0.0.0"])
    scheduler["resources"] = {"requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"memory": "2Gi"}}
    scheduler["ports"] = [
        {"name": "tcp-comm", "containerPort": 8786},
        {"name": "http-dashboard", "containerPort": 8787},
    ]
    scheduler["readinessProbe"] = {
        "httpGet": {"port": "http-dashboard", "path": "/health"},
        "periodSeconds": 2,
        "timeoutSeconds": 10,
    }
    ports = [
        {"name": port["name"], "protocol": "TCP", "port": port["containerPort"], "targetPort": port["name"]}
        for port in scheduler["ports"]
    ]
    selector = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    taints = [*(SPOT if settings.spot else ()), *gpu]
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name},
        "spec": {
            "worker": {"replicas": 0, "spec": _pod(config, worker, taints)},
            "scheduler": {
                "spec": _pod(config, scheduler, []),
                "service": {"type": "ClusterIP", "selector": selector, "ports": ports},
            },
        },
    }


def manifest(config: ClusterConfig, in_flight: int) -> str:
    """The resource as YAML, as `run --dry-run` prints it."""
    return str(yaml.safe_dump(spec(config, in_flight, "emsr"), sort_keys=False))


@contextmanager
def pods(config: ClusterConfig, in_flight: int) -> Iterator[Client]:
    """A context with the client of a new Dask cluster of pods; leaving it deletes the cluster.

    Each worker runs `in_flight` slabs. Raises ClusterError where dask-kubernetes is missing or Kubernetes gives no
    cluster.
    """
    try:
        from dask_kubernetes.operator import KubeCluster
    except ImportError:
        raise ClusterError(
            "the dask-kubernetes package is not installed", "", "pip install 'emsr[kubernetes]'"
        ) from None
    assert config.kubernetes is not None
    namespace, name = config.kubernetes.namespace, f"emsr-{uuid.uuid4().hex[:8]}"
    made = spec(config, in_flight, name)
    with PodWatch(lambda: _pods_of(name, namespace)) as watch:
        try:
            with waiting(_Starting(watch)):
                cluster = KubeCluster(custom_cluster_spec=made, namespace=namespace, quiet=True)
        except NoAnswerError:
            raise
        except Exception as error:  # kr8s, httpx and the operator's own time-outs share no ancestor
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ClusterError(
                f"Kubernetes gives no Dask cluster ({why}{'; ' * bool(str(watch))}{watch})",
                "a cluster with the dask-kubernetes operator",
                "See docs/clusters.md",
            ) from None
        cluster.watch = watch
        with closing(cluster, "Kubernetes to delete the pods"), PatientClient(cluster, set_as_default=False) as client:
            minimum, maximum = config.bounds()
            if minimum < maximum:
                cluster.adapt(minimum=minimum, maximum=maximum)
            else:
                cluster.scale(maximum)
            yield client


def may_come(cluster: Any) -> bool:
    """Whether a worker may still come where there is none. Raises ClusterError where pods do not start for good."""
    cluster.watch.refuse()
    return True


def why_none(cluster: Any) -> str:
    """Why no worker has come yet: what is wrong with the cluster's pods."""
    return str(cluster.watch)


class _Starting:
    """What the client waits for until the scheduler's pod runs, as a text that tells the pods' faults."""

    def __init__(self, watch: PodWatch) -> None:
        self._watch = watch

    def __str__(self) -> str:
        return f"Kubernetes to start the scheduler{'; ' * bool(str(self._watch))}{self._watch}"


def _pods_of(name: str, namespace: str | None) -> list[Pod]:
    import kr8s

    return [pod.raw for pod in kr8s.get("pods", namespace=namespace, label_selector={"dask.org/cluster-name": name})]


def _pod(config: ClusterConfig, container: dict[str, Any], taints: list[str]) -> dict[str, Any]:
    """Unprivileged, with no access to the Kubernetes API; `taints` are those it may run beside."""
    settings = config.kubernetes
    assert settings is not None
    volumes: list[dict[str, Any]] = [{"name": "scratch", "emptyDir": {}}]
    if settings.secret is not None and container["name"] == "worker":
        volumes.append({"name": "credentials", "secret": {"secretName": settings.secret}})
    if settings.volume_claim is not None and container["name"] == "worker":
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": settings.volume_claim}})
    return {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [{"key": key, "operator": "Exists"} for key in taints],
        "containers": [container],
        "volumes": volumes,
    }


def _container(config: ClusterConfig, name: str, args: list[str]) -> dict[str, Any]:
    settings = config.kubernetes
    assert settings is not None
    env = dict(WORKER_ENVIRON)
    if name == "worker" and config.gpus_per_worker == 0:
        env["CUDA_VISIBLE_DEVICES"] = ""
    mounts: list[dict[str, Any]] = [{"name": "scratch", "mountPath": "/tmp"}]
    if settings.secret is not None and name == "worker":
        mounts.append({"name": "credentials", "mountPath": CREDENTIALS, "readOnly": True})
        env |= {
            "AWS_SHARED_CREDENTIALS_FILE": f"{CREDENTIALS}/aws",
            "GOOGLE_APPLICATION_CREDENTIALS": f"{CREDENTIALS}/gcs.json",
        }
    if settings.volume_claim is not None and name == "worker":
        mounts.append({"name": "data", "mountPath": "/data"})
    return {
        "name": name,
        "image": settings.image,
        "command": ["dask"],
        "args": args,
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
