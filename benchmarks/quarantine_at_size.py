"""Measures how long a ledger takes for many quarantined tasks on a slow store, and for how long a run stands still.

    python benchmarks/quarantine_at_size.py [tasks=2000] [seconds=0.1]
    PYTHONPATH=OTHER_CHECKOUT python benchmarks/quarantine_at_size.py    # the ledger of another commit

The ledger and its client of S3 are the real ones. The store is a process of its own that speaks as much of S3 as they
ask, and answers each PUT after so many seconds. A loop calls `tick` twenty times a second, as a run does after every
answer. Measured are the seconds until the last task is durable, those in which `tick` did not return, and the longest
of these. Counted by the store are PUTs, and how many of them it had at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection

from pipeline.plan.receipt import QUARANTINED, Receipt
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger

LOOP_S = 0.05
ERROR = "MissingChunkError: chunk 1.2.3 of s3://em/volume is absent\n\n" + "  File 'somewhere', line 1\n" * 40


class _SlowStore:
    """Buckets without a memory: what is put is counted and forgotten."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.puts = self.most = self._now = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
                await reader.readexactly(length)
                if head.startswith("put "):
                    self.puts += 1
                    self._now += 1
                    self.most = max(self.most, self._now)
                    await asyncio.sleep(self._seconds)
                    self._now -= 1
                writer.write(b'HTTP/1.1 200 OK\r\nETag: "1"\r\nContent-Length: 0\r\n\r\n')
                await writer.drain()


def _serve(seconds: float, pipe: Connection) -> None:
    """Say the port, then serve until something is sent, and say what was counted."""

    async def serve() -> None:
        store = _SlowStore(seconds)
        server = await asyncio.start_server(store.answer, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.to_thread(pipe.recv)
        pipe.send((store.puts, store.most))

    asyncio.run(serve())


@contextlib.contextmanager
def slow_store(seconds: float) -> Iterator[Connection]:
    """Where this process's s3:// leads meanwhile. Sent anything, the store says its PUTs and the most at a time."""
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(seconds, there))
    process.start()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        yield here
    finally:
        process.kill()
        process.join()


def measure(tasks: int, seconds: float) -> dict[str, float]:
    with slow_store(seconds) as counts:
        ledger = Ledger(Store("s3://bench/sr.emsr"), "d" * 64, tasks, "bench")
        ledger.record(Receipt(i, QUARANTINED, error=ERROR, worker="node1:1") for i in range(tasks))
        began, ticks = time.monotonic(), list[float]()
        while ledger._queued:
            time.sleep(LOOP_S)
            before = time.monotonic()
            ledger.tick()
            ticks.append(time.monotonic() - before)
        took = time.monotonic() - began
        counts.send("")
        puts, most = counts.recv()
    return {
        "tasks": tasks,
        "s_until_durable": round(took, 1),
        "s_in_tick": round(sum(ticks), 1),
        "longest_tick_s": round(max(ticks), 2),
        "puts": puts,
        "most_at_a_time": most,
    }


if __name__ == "__main__":
    print(measure(int((sys.argv[1:] or ["2000"])[0]), float((sys.argv[2:] or ["0.1"])[0])))
