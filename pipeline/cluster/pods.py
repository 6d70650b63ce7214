"""Pods of Kubernetes that do not start, and why: no image, no node with room, no secret."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.base.errors import ClusterError

LOOK_S = 5.0
FAULTY_S = 300.0
"""A run without a worker ends when its pods have been faulty for so long. Kubernetes tries them again until then."""
UNPLACED_S = 3600.0
"""The same for pods for which no node has room: one may be on its way."""
WELL_S = 60.0
"""A container that crashes again and again runs in between: less than this is no recovery."""
SHOWN = 3
COMPONENT = "dask.org/component"
_STARTING = ("ContainerCreating", "PodInitializing")

Pod = Mapping[str, Any]
"""A pod as Kubernetes describes it in JSON."""


def fault(pod: Pod) -> str:
    """Why this pod cannot start, as Kubernetes calls it; "" where it runs or is on its way."""
    status = pod.get("status", {})
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = container.get("state", {}).get("waiting", {})
        if (reason := waiting.get("reason", "")) and reason not in _STARTING:
            last = container.get("lastState", {}).get("terminated", {})
            ended = f"it ended with code {last['exitCode']}" if "exitCode" in last else ""
            return _line(reason, waiting.get("message") or ended)
    if status.get("phase") == "Failed":
        return _line(status.get("reason", "Failed"), status.get("message", ""))
    return ""


def unplaced(pod: Pod) -> str:
    """Why no node takes this pod; "" where one does, or is still looked for."""
    for condition in pod.get("status", {}).get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return _line(condition.get("reason", "Unschedulable"), condition.get("message", ""))
    return ""


class _Lasting:
    """Since when something has been so, apart from moments."""

    def __init__(self) -> None:
        self._since = self._seen = float("-inf")

    def look(self, so: bool, now: float) -> None:
        if so and now - self._seen > WELL_S:
            self._since = now
        if so:
            self._seen = now

    def seconds(self, now: float) -> float:
        return now - self._since if now - self._seen <= WELL_S else 0.0


class PodWatch:
    """Looks at the pods of a cluster in a thread of its own, while the `with` lasts. Its text says what is wrong.

    `pods` asks Kubernetes; what it raises is said too.
    """

    def __init__(self, pods: Callable[[], Iterable[Pod]]) -> None:
        self._pods = pods
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_again, name="emsr-pods", daemon=True)
        self._faulty: dict[str, str] = {}
        self._unplaced: dict[str, str] = {}
        self._all_faulty, self._none_placed = _Lasting(), _Lasting()
        self._silent = ""

    def __enter__(self) -> PodWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def __str__(self) -> str:
        if self._silent:
            return f"Kubernetes does not answer ({self._silent})"
        found = [f"pod {name}: {why}" for name, why in [*self._faulty.items(), *self._unplaced.items()]]
        return "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")

    def refuse(self) -> None:
        """Raises ClusterError where no pod can be expected to start any more."""
        now = time.monotonic()
        if self._all_faulty.seconds(now) > FAULTY_S or self._none_placed.seconds(now) > UNPLACED_S:
            raise ClusterError(
                f"no worker, since pods do not start ({self})",
                "pods that can run",
                "Correct cluster.kubernetes (image, secret, volume_claim, memory, cores), "
                "and see `kubectl describe pod`",
            )

    def _look_again(self) -> None:
        while not self._ended.wait(LOOK_S):
            try:
                self.look()
            except Exception as error:  # of kr8s and httpx: it is asked again
                self._silent = _line(type(error).__name__, str(error))

    def look(self) -> None:
        """Ask once. Raises whatever `pods` raises."""
        named = {str(pod["metadata"]["name"]): pod for pod in self._pods()}
        self._faulty = {name: why for name, pod in named.items() if (why := fault(pod))}
        self._unplaced = {name: why for name, pod in named.items() if (why := unplaced(pod))}
        self._silent, now = "", time.monotonic()
        scheduler = {name for name, pod in named.items() if pod["metadata"]["labels"].get(COMPONENT) == "scheduler"}
        workers = named.keys() - scheduler
        stuck = self._faulty.keys() | self._unplaced.keys()
        self._all_faulty.look(
            bool(scheduler & self._faulty.keys() or (workers and workers <= self._faulty.keys())), now
        )
        self._none_placed.look(bool(scheduler & stuck or (workers and workers <= stuck)), now)


def _line(reason: str, message: str) -> str:
    text = " ".join(f"{reason}: {message}".split()).rstrip(": ")
    return text if len(text) <= 200 else text[:199] + "…"
