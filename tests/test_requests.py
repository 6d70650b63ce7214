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
from pipeline.base.geometry import ZYX, Box, chunk_count, tiles
from pipeline.storage import requests
from pipeline.storage.kv import Store
from pipeline.storage.requests import Pace, Rates, Troubles
from pipeline.storage.targets.open import open_target
from pipeline.storage.volume import LevelSpec, TargetSpec


def test_a_share_is_the_bound_over_the_workers() -> None:
    assert Rates(5000, None).share(1000) == Rates(5.0, None)
    assert Rates(10, 4).share(0) == Rates(10, 4)


def test_requests_wait_for_their_turn() -> None:
    """A second's worth at once, then the rate: 100 in steps of 10 at 50 a second are 1 s late at the end."""
    pace = Pace()
    pace.take(10**9)  # no bound: no wait
    pace.per_second = 50
    began = time.monotonic()
    for _ in range(10):
        pace.take(10)
    assert 0.9 <= time.monotonic() - began < 3


def test_threads_share_one_pace() -> None:
    pace = Pace()
    pace.per_second = 50
    began = time.monotonic()
    threads = [threading.Thread(target=pace.take, args=(20,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.9 <= time.monotonic() - began < 3


def test_puts_are_paced(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    requests.limit(Rates(write=50))
    try:
        began = time.monotonic()
        for _ in range(2):
            store.put_all({str(i): b"x" for i in range(50)})
        assert time.monotonic() - began >= 0.9
    finally:
        requests.limit(Rates())


def test_chunks_of_a_box() -> None:
    box, chunk = Box.of((1, -5, 3), (4, 9, 16)), ZYX(2, 4, 8)
    assert chunk_count(box, chunk) == len(list(tiles(box, chunk))) == 2 * 5 * 2
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


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_pace_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 a second: 50 at once after a rest, however long it was, then one each 20 ms."""
    clock = Clock()
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


def test_troubles_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lease tells what happened since the last one that ended in its process."""
    refused = iter([5, 5, 12])
    monkeypatch.setattr(requests, "_refused", lambda: next(refused))
    record = requests._Record()
    record.retry()
    record.retry()
    assert record.take() == Troubles(5, 2)
    assert record.take() == Troubles(0, 0)
    record.retry()
    assert record.take() == Troubles(7, 1)
