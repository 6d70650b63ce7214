"""Workers that speak Dask's protocol with a scheduler and compute nothing: ten thousand of them fit into one process.

    python stand_in_workers.py ADDRESS COUNT LEASES_PER_S THREADS

Each has a connection of its own, registers as a worker does, sends heartbeats as often as it is told, with the facts
of a real worker, and answers its leases by emsr's own code. The leases of all are answered in the order in which they
came, so many a second. Not there are nannies, the second connection of a worker (its heartbeats go through one that
all share), and threads that compute.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from typing import Any

from distributed import Worker
from distributed.comm.core import Comm, connect
from distributed.core import rpc

from pipeline.schedule import results

OPEN_AT_ONCE = 32


class _Task:
    """What `results` asks of the worker that it runs in."""

    def __init__(self, address: str, key: str) -> None:
        self.address, self._key = address, key
        self.told: list[dict[str, Any]] = []

    def get_current_task(self) -> str:
        return self._key

    def log_event(self, topic: str, message: Any) -> None:
        self.told.append({"op": "log-event", "topic": topic, "msg": message})


class StandIns:
    def __init__(self, scheduler: str, facts: dict[str, Any], threads: int) -> None:
        self._scheduler, self._facts, self._threads = scheduler, facts, threads
        self._due: deque[tuple[Comm, str, dict[str, Any]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._addresses: list[str] = []
        self.interval_s = 1.0

    async def begin(self, number: int) -> None:
        address = f"tcp://127.0.{1 + number // 250}.{1 + number % 250}:9000"
        comm = await connect(self._scheduler)
        hello = self._facts | {"op": "register-worker", "reply": False, "address": address, "name": number}
        hello |= {"resolve_address": False, "nthreads": self._threads, "now": time.time(), "server_id": f"w-{number}"}
        await comm.write(hello | {"stimulus_id": "begin"}, serializers=["msgpack"])
        answer = await comm.read(deserializers=["msgpack"])
        assert answer["status"] == "OK", answer
        self.interval_s = answer["heartbeat-interval"]
        self._addresses.append(address)
        task = asyncio.create_task(self._listen(comm, address))
        self._tasks.add(task)

    async def _listen(self, comm: Comm, address: str) -> None:
        while True:
            for message in await comm.read():
                if message["op"] == "compute-task":
                    if message["key"].startswith("check-"):
                        await self._end(comm, address, message)
                    else:
                        self._due.append((comm, address, message))

    async def heartbeats(self) -> None:
        scheduler, turn = rpc(self._scheduler), 0
        while True:
            if self._addresses:
                turn = (turn + 1) % len(self._addresses)
                await scheduler.heartbeat_worker(
                    address=self._addresses[turn],
                    resolve_address=False,
                    now=time.time(),
                    metrics=self._facts["metrics"],
                    executing={},
                    extensions={},
                )
            await asyncio.sleep(self.interval_s / max(1, len(self._addresses)))

    async def answer(self, per_s: float) -> None:
        began, answered = time.monotonic(), 0.0
        while True:
            await asyncio.sleep(0.02)
            now = time.monotonic()
            answered = max(answered, (now - began) * per_s - per_s)  # at most a second's answers are made up for
            while self._due and answered < (now - began) * per_s:
                answered += 1
                await self._end(*self._due.popleft())

    async def _end(self, comm: Comm, address: str, message: dict[str, Any]) -> None:
        task = _Task(address, message["key"])
        results.get_worker = lambda: task  # type: ignore[assignment]
        message["run_spec"]()
        ended = {"op": "task-finished", "status": "OK", "key": message["key"], "run_id": message["run_id"]}
        ended |= {"nbytes": 16, "type": b"", "typename": "NoneType", "metadata": {}, "thread": 1, "stimulus_id": "end"}
        await comm.write([*task.told, ended | {"startstops": []}])


async def main(scheduler: str, count: int, per_s: float, threads: int) -> None:
    async with Worker(scheduler, nthreads=1, dashboard=False) as real:
        facts = {"status": "running", "resources": {}, "memory_limit": real.memory_manager.memory_limit}
        facts |= {"local_directory": real.local_directory, "services": {}, "nanny": None, "pid": os.getpid()}
        facts |= {"versions": {}, "metrics": await real.get_metrics()}
        facts |= {"extra": await real.get_startup_information()}
    stand_ins = StandIns(scheduler, facts, threads)
    jobs = [asyncio.create_task(stand_ins.heartbeats()), asyncio.create_task(stand_ins.answer(per_s))]
    for first in range(0, count, OPEN_AT_ONCE):
        await asyncio.gather(*(stand_ins.begin(n) for n in range(first, min(count, first + OPEN_AT_ONCE))))
    print("ready", flush=True)
    await asyncio.gather(*jobs)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
