"""Requests to stores: paced by a budget, counted where they are refused, and a run that ends well all the same."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from conftest import main_job, texture, volume_yaml, write_lr
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from pipeline import status
from pipeline.base.geometry import ZYX, Box, chunk_count, grid_parts
from pipeline.plan.requests import RequestCounts, RequestRates
from pipeline.plan.target_spec import LevelSpec, TargetSpec
from pipeline.storage import requests
from pipeline.storage.kv import Store
from pipeline.storage.requests import Pace
from pipeline.storage.targets.open import open_target


def test_a_share_is_the_bound_over_the_workers() -> None:
    assert RequestRates(5000, None).share(1000) == RequestRates(5.0, None)
    assert RequestRates(10, 4).share(0) == RequestRates(10, 4)


class Clock:
    """This is the `time` of pipeline.storage.requests for a test: it notes what is slept, and moves or stands still."""

    def __init__(self, moves: bool) -> None:
        self.now, self.moves, self.slept = 1024.0, moves, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds * self.moves


def test_requests_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second's worth passes at once, then the rate holds: of 128, 16 at a time at 64 a second, the last 64 wait."""
    clock = Clock(moves=True)
    monkeypatch.setattr(requests, "time", clock)
    pace = Pace()
    pace.take(10**9)
    assert not clock.slept, "no bound: no wait"
    pace.per_second = 64
    for _ in range(8):
        pace.take(16)
    assert clock.slept == [0.25] * 4


def test_threads_share_one_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five that come at once with 32 each at 64 a second go at 0, 0, 0.5, 1 and 1.5 s, in whatever order they came."""
    clock = Clock(moves=False)
    monkeypatch.setattr(requests, "time", clock)
    pace = Pace()
    pace.per_second = 64
    threads = [threading.Thread(target=pace.take, args=(32,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(clock.slept) == [0.5, 1.0, 1.5]


def test_puts_are_paced(tmp_path: Path) -> None:
    """By the real clock: no sleep ends early, so 100 puts at 50 a second take the second that the first 50 do not."""
    store = Store(f"file://{tmp_path}")
    requests.limit(RequestRates(write=50))
    try:
        began = time.monotonic()
        for _ in range(2):
            store.put_all({str(i): b"x" for i in range(50)})
        assert time.monotonic() - began >= 0.9
    finally:
        requests.limit(RequestRates())


def test_chunks_of_a_box() -> None:
    box, chunk = Box.of((1, -5, 3), (4, 9, 16)), ZYX(2, 4, 8)
    assert chunk_count(box, chunk) == len(list(grid_parts(box, chunk))) == 2 * 5 * 2
    assert chunk_count(Box.of((0, 0, 0), (0, 4, 4)), chunk) == 0


Environ = dict[str, Any]


class EveryThirdRefused:
    """WSGI: every third request is answered 503 or 429, in turn; the others are the emulator's."""

    def __init__(self, app: Callable[[Environ, Any], Iterable[bytes]]) -> None:
        self._app, self._number, self._lock, self.on, self.refused = app, itertools.count(1), threading.Lock(), False, 0

    def __call__(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        with self._lock:
            number = next(self._number)
            refuse = self.on and number % 3 == 0
            self.refused += refuse
        if not refuse:
            return self._app(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Slow Down" if number % 2 else "429 Too Many Requests", [("Content-Length", "0")])
        return [b""]


@pytest.fixture
def grudging(monkeypatch: pytest.MonkeyPatch) -> Iterator[EveryThirdRefused]:
    app = EveryThirdRefused(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
    }
    for key, value in (values | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(key, value)
    yield app
    server.shutdown()


def test_a_store_that_refuses_a_third_of_all_requests(
    grudging: EveryThirdRefused, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends, nothing is quarantined, and what was refused is shown."""
    write_lr(tmp_path / "lr.zarr", texture((4, 32, 32)))
    boto3.client("s3").create_bucket(Bucket="brain")
    path = volume_yaml(
        tmp_path / "v.yaml",
        "lr.zarr",
        "s3://brain/sr",
        work__slab_shape=[4, 16, 16],
        work__requests_per_second={"write": 1000},
    )
    grudging.on = True
    main_job(path, "run")
    grudging.on = False
    told = json.loads(boto3.client("s3").get_object(Bucket="brain", Key="sr.emsr/report.json")["Body"].read())
    assert told["ledger"]["written"] == told["ledger"]["planned"]
    assert 0 < told["requests"]["refused"] < grudging.refused, "those of the client itself are not the workers'"
    assert status.main([str(path)]) == 0
    assert f"{told['requests']['refused']} were answered 429 or 503" in capsys.readouterr().out
    assert told["work"]["requests_per_second"] == {"read": None, "write": 1000}


def test_a_pace_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 a second: 50 at once after a rest, however long it was, then one each 20 ms."""
    clock = Clock(moves=True)
    monkeypatch.setattr(requests, "time", clock)
    pace = Pace()
    pace.per_second = 50
    for rest in (0, 3600):
        clock.now += rest
        began = clock.now
        pace.take(50)
        assert clock.now == began
        pace.take(10)
        assert clock.now - began == pytest.approx(0.2)
        pace.take(100)
        assert clock.now - began == pytest.approx(2.2)


def test_every_put_and_every_chunk_read_is_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paid: dict[str, list[int]] = {"WRITES": [], "READS": []}
    for name, counts in paid.items():
        monkeypatch.setattr(getattr(requests, name), "take", counts.append)
    level = LevelSpec(ZYX(4, 64, 64), ZYX(2, 16, 16), ZYX(4, 32, 32))
    spec = TargetSpec(tmp_path.as_uri(), "ome-zarr", "raw", 8, (1, 1, 1), (0, 0, 0), (level,), None, {})
    target = open_target(spec)
    target.create()
    paid["WRITES"].clear()
    box = Box(ZYX(0, 0, 0), level.shape)
    target.put(target.encode(0, box, np.ones(tuple(box.shape), np.uint8)))
    assert paid["WRITES"] == [4]
    target.read(0, Box.of((0, 0, 8), (3, 16, 24)))
    assert paid["READS"] == [2 * 1 * 2]


def test_failed_requests_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lease tells what happened since the last one that ended in its process."""
    refused = iter([5, 5, 12])
    monkeypatch.setattr(requests, "_refused", lambda: next(refused))
    counter = requests._Counter()
    counter.retry()
    counter.retry()
    assert counter.take() == RequestCounts(5, 2)
    assert counter.take() == RequestCounts(0, 0)
    counter.retry()
    assert counter.take() == RequestCounts(7, 1)
