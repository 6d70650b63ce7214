"""Clusters that are already there, over TLS, of another version, with workers that leave; who gets which GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import write_certificates
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, texture, tree, volume_yaml, wait_until, write_lr
from dask import config as dask_config
from dask.utils import key_split
from distributed import Client, LocalCluster, Scheduler, Worker
from sleepy import job_of, nothing

from pipeline.base.errors import ClusterError, LedgerError
from pipeline.cluster import connect as cluster
from pipeline.cluster import steady_clock
from pipeline.config import volume as config
from pipeline.config.cluster import ClusterConfig
from pipeline.prepare.prepare import prepare
from pipeline.schedule.in_flight import InFlight
from pipeline.schedule.leases import Lease
from pipeline.schedule.results import TOPIC, Results, pack, run_packed
from pipeline.worker.job import LeaseResult
from pipeline.worker.lease import process_lease
from pipeline.worker.open_job import open_job

SHAPE = (6, 40, 32)
SMALL: dict[str, Any] = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lr(tmp_path / "lr.zarr", texture(SHAPE))


@contextlib.contextmanager
def dask(*args: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A scheduler or worker in a process of its own."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    variables = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}", **environ}
    with subprocess.Popen([sys.executable, "-m", "dask", *args, "--no-dashboard"], env=variables, **quiet) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def scheduler(folder: Path, *args: str) -> Iterator[tuple[str, list[str]]]:
    """A scheduler's address, and the arguments by which workers find it."""
    place = folder / "scheduler.json"
    with dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(place), *args):
        wait_until(lambda: place.exists() and place.read_text().endswith("}"))
        yield (
            json.loads(place.read_text())["address"],
            ["worker", "--scheduler-file", str(place), "--nthreads", "1", "--no-nanny"],
        )


def test_a_cluster_over_tls(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real certificates, named relative to volume.yaml; a client of another authority is refused in one message."""
    files = write_certificates(tmp_path)
    flags = [
        f"--tls-{name}={tmp_path / file}"
        for name, file in (("ca-file", "ca.pem"), ("cert", "cert.pem"), ("key", "key.pem"))
    ]
    (tmp_path / "stranger").mkdir()
    write_certificates(tmp_path / "stranger")
    with scheduler(tmp_path, "--protocol", "tls", *flags) as (address, join), dask(*join, *flags):
        assert address.startswith("tls://")
        there = {"kind": "address", "address": address, "security": files}
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=there)
        main_job(path, "run")
        monkeypatch.setattr(cluster, "CONNECT_S", 3)
        strange = there | {"security": {key: f"stranger/{file}" for key, file in files.items()}}
        with (
            pytest.raises(ClusterError, match="no Dask scheduler answers"),
            cluster.connect(ClusterConfig(**strange).beside(tmp_path), 1),
        ):
            pass
    assert json.loads((tmp_path / "sr.emsr" / "report.json").read_text())["ledger"]["pending"] == 0


def test_a_worker_of_another_version_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("import pipeline\npipeline.__version__ = '9.9.9'\n")
    with scheduler(tmp_path) as (address, join), dask(*join, "--preload", str(tmp_path / "other.py")):
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": address})
        before = tree(tmp_path)
        said = main_job(path, "run", check=False)
    assert said.returncode == 2, said.stderr
    assert "has emsr 9.9.9" in said.stderr
    assert "Traceback" not in said.stderr
    assert tree(tmp_path) == before


def test_a_worker_refuses_a_client_of_another_version(source: Path, tmp_path: Path) -> None:
    """That holds for workers that join later too."""
    job = prepare(config.load(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr"))).job
    with pytest.raises(ClusterError, match=r"the client has emsr 9\.9\.9"):
        open_job(dataclasses.replace(job, emsr="9.9.9"))


def test_a_worker_at_the_end_of_its_lifetime_is_no_failure(source: Path, tmp_path: Path) -> None:
    """It leaves with slabs in flight: no death counts against their leases, and another worker runs them."""
    hold = tmp_path / "hold"
    preload = ["--preload", str(TESTS / "run_standin.py")]
    main_job(volume_yaml(tmp_path / "local.yaml", "lr.zarr", "undisturbed", **SMALL))
    with scheduler(tmp_path) as (address, join), dask(*join, *preload, STANDIN_HOLD=str(hold)) as leaves:
        path = volume_yaml(
            tmp_path / "v.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": address}, **SMALL
        )
        hold.touch()
        with subprocess.Popen(
            [sys.executable, str(TESTS / "run_standin.py"), str(path)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
        ) as client:
            with Client(address, set_as_default=False) as watch:
                wait_until(
                    lambda: any(str(key).startswith("lease-") for keys in watch.processing().values() for key in keys)
                )
                watch.run(
                    lambda dask_worker: dask_worker.loop.add_callback(dask_worker.close_gracefully)
                )  # what its timer calls
                wait_until(lambda: not watch.nthreads())
                deaths = watch.run_on_scheduler(
                    lambda dask_scheduler: {str(t.key): t.suspicious for t in dask_scheduler.tasks.values()}
                )
            assert any(key.startswith("lease-") for key in deaths)
            assert not any(deaths.values())
            hold.unlink()
            leaves.wait(GUARD_S)
            with dask(*join, *preload):
                _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == 0, said
    assert '"quarantined": 0' in said
    assert tree(tmp_path / "sr") == tree(tmp_path / "undisturbed")


def test_no_worker_is_profiled() -> None:
    """Not those that are there, and not those that come later."""
    as_dask_begins = {"distributed.worker.profile.enabled": True}
    with dask_config.set(as_dask_begins), cluster.connect(ClusterConfig(workers=1), 2) as client:

        def profiled() -> list[bool]:
            return list(
                client.run(
                    lambda dask_worker: any("profile" in name for name in dask_worker.periodic_callbacks)
                ).values()
            )

        assert profiled() == [True]
        cluster.stop_profiling(client)
        client.cluster.scale(2)
        client.wait_for_workers(2)
        assert profiled() == [False, False]


def test_a_scheduler_that_was_there_keeps_few_of_its_messages() -> None:
    """A thousand to every worker, whole leases among them, as Dask has it, would be gigabytes with that many."""

    def kept(dask_scheduler: Scheduler) -> set[int | None]:
        return {
            sent.recent_message_log.maxlen
            for sent in (*dask_scheduler.stream_comms.values(), *dask_scheduler.client_comms.values())
        }

    as_dask_has_it = {"distributed.admin.low-level-log-length": 1000}
    with (
        dask_config.set(as_dask_has_it),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as there,
        Client(there) as client,
    ):
        assert client.run_on_scheduler(kept) == {1000}
        cluster.shorten_logs(client)
        there.scale(2)
        client.wait_for_workers(2)
        assert client.run_on_scheduler(kept) == {2}


@pytest.mark.parametrize("tune", [None, True])
def test_a_cluster_of_others_is_changed_where_the_file_says_so(source: Path, tmp_path: Path, tune: bool | None) -> None:
    """Profiler, clock and logs of scheduler and worker, after a whole run."""
    there: dict[str, Any] = {"kind": "address"} | ({} if tune is None else {"tune": tune})

    def state(dask_scheduler: Scheduler) -> tuple[set[int | None], str]:
        return {sent.recent_message_log.maxlen for sent in dask_scheduler.stream_comms.values()}, clock()

    def clock() -> str:
        return str(sys.modules["tornado.ioloop"].IOLoop.time.__module__)

    def worker_state(dask_worker: Worker) -> tuple[bool, str, set[str]]:
        profiled = any("profile" in name for name in dask_worker.periodic_callbacks)
        return profiled, clock(), {name for name in dask_worker.plugins if name.startswith("emsr")}

    with scheduler(tmp_path) as (address, join), dask(*join), Client(address, set_as_default=False) as watch:
        watch.wait_for_workers(1)
        before = watch.run_on_scheduler(state), *watch.run(worker_state).values()
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=there | {"address": address}, **SMALL)
        main_job(path, "run")
        after = watch.run_on_scheduler(state), *watch.run(worker_state).values()
    assert (after != before) is bool(tune)
    if tune:
        (logs, scheduler_clock), (profiled, worker_clock, _) = after
        assert logs == {2}
        assert scheduler_clock == worker_clock == "pipeline.cluster.steady_clock"
        assert not profiled


def test_what_a_killed_run_left_running_is_no_answer() -> None:
    """Its tasks are called as this run's might be, and go on after it: two runs of one target share no key."""
    with cluster.connect(ClusterConfig(workers=1), 1) as client:
        job = job_of("/nowhere", 1, 1)
        prefixes = {InFlight(client, job, process_lease)._prefix for _ in range(2)}
        assert len(prefixes) == 2
        assert {key_split(f"{prefix}-1") for prefix in prefixes} == {"lease"}
        results = Results(client, "lease-mine")
        for key in ("lease-mine-1", "lease-other-1"):
            client.submit(run_packed, pack(TOPIC, nothing, job, 0, 1, 1.0), key=key).result(timeout=GUARD_S)
        ended = results.take("lease-mine-1")
        assert ended is not None
        assert ended.outcome == LeaseResult((), 0, 0)
        assert ended.process.address in client.nthreads()
        assert results.take("lease-mine-1") is None
        assert results.take("lease-other-1") is None


def test_nothing_is_handed_out_once_the_target_is_lost() -> None:
    """A client may stand still between any two lines, and go on after another one has taken over."""

    def lost() -> None:
        raise LedgerError("another run took this target over")

    with cluster.connect(ClusterConfig(workers=1), 1) as client:
        in_flight = InFlight(client, job_of("/nowhere", 1, 1), process_lease, hold=lost)
        wait_until(lambda: in_flight.capacity().workers)
        with pytest.raises(LedgerError):
            in_flight.start(Lease(range(1), 1.0, 0, 0.0))
        assert not any(client.processing().values())
        assert in_flight.collect(0.0) == []


def test_no_clock_that_is_set_holds_messages_up() -> None:
    """Messages of client, scheduler, workers and those that come later wait by a clock of emsr's.

    tests/faults.py sets real clocks back.
    """
    with cluster.connect(ClusterConfig(workers=1), 2) as client:
        steady_clock.install_everywhere(client)
        client.cluster.scale(2)
        client.wait_for_workers(2)
        clocks = (
            "__import__('distributed').batched.time.__module__, "
            "__import__('tornado.ioloop').ioloop.IOLoop.time.__module__"
        )
        found = [eval(clocks), client.run_on_scheduler(eval, clocks), *client.run(eval, clocks).values()]
        assert found == [("pipeline.cluster.steady_clock",) * 2] * 4
    assert abs(steady_clock.steady() - time.time()) < 60


def devices(config: ClusterConfig) -> set[tuple[str | None, str | None]]:
    with cluster.connect(config, 1) as client:
        return set(client.run(lambda: (os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("EMSR_DEVICE"))).values())


def test_each_local_worker_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many workers as GPUs are visible, each with one of them by its name; none with gpus_per_worker 0.

    With 1 there are never more workers than GPUs.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5d")
    assert cluster.worker_count(ClusterConfig()) == 2
    assert devices(ClusterConfig(gpus_per_worker=1)) == {("3", None), ("GPU-5d", None)}
    assert devices(ClusterConfig(workers=1, gpus_per_worker=0)) == {("", None)}
    with (
        pytest.raises(ClusterError, match="3 workers are to have a GPU each, 2 are visible"),
        cluster.connect(ClusterConfig(workers=3, gpus_per_worker=1), 1),
    ):
        pass
