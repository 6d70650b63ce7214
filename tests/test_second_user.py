"""Another user of the same machine gets into nothing: no port of a run's, no folder that it keeps for itself."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import second_user
from conftest import GUARD_S, REPOSITORY, TESTS, texture, volume_yaml, wait_until, write_lr
from distributed import Client, LocalCluster

from pipeline.base.errors import ClusterError
from pipeline.cluster import certificates
from pipeline.cluster import connect as cluster
from pipeline.config.cluster import ClusterConfig, SecurityConfig

pytestmark = pytest.mark.skipif(second_user.why_not() is not None, reason=second_user.why_not() or "")


def test_a_cluster_without_certificates_is_open_to_a_second_user() -> None:
    """So the other tests would see it: Dask's own local cluster answers, and its pages are read."""
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as there:
        (worker,) = there.scheduler_info["workers"]
        ports = {int(address.rpartition(":")[2]) for address in (there.scheduler_address, worker)}
        pages = there.scheduler.http_server.port
        expected = {*(f"{port}: plain" for port in ports), f"{pages}: pages", "/proc/self/status"}
        wait_until(lambda: expected <= set(second_user.got_in([*ports, pages], ["/proc/self/status"])))


def test_a_local_run_lets_no_second_user_in(tmp_path: Path) -> None:
    """All ports of the client (with scheduler and nannies) and of the workers are tried while slabs are computed."""
    write_lr(tmp_path / "lr.zarr", texture((6, 40, 32)))
    path = volume_yaml(
        tmp_path / "v.yaml", "lr.zarr", "sr", network__name="nearest", cluster={"kind": "local", "workers": 2}
    )
    hold = tmp_path / "hold"
    hold.touch()
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{TESTS}", "STANDIN_HOLD": str(hold)}
    environ |= {"TMPDIR": str(tmp_path), "DASK_DISTRIBUTED__WORKER__PRELOAD": str(TESTS / "run_standin.py")}
    tmp_path.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, str(TESTS / "run_standin.py"), str(path)], env=environ, stderr=subprocess.PIPE, text=True
    ) as client:
        run = psutil.Process(client.pid)
        wait_until(lambda: client.poll() is not None or (tmp_path / "sr.emsr" / "plan.json").exists())
        assert client.poll() is None, client.communicate()
        processes = [run, *run.children(recursive=True)]
        ports = second_user.listening(processes)
        (scratch,) = tmp_path.glob("emsr-*")
        inside = [path for path in scratch.rglob("*") if path.is_dir()]
        got = second_user.got_in(ports, [scratch, *inside, *(f"/proc/{p.pid}/environ" for p in processes)])
        said = " ".join(argument for process in processes for argument in process.cmdline())
        hold.unlink()
        _, told = client.communicate(timeout=GUARD_S)
    assert client.returncode == 0, told
    assert len(ports) >= 5, "scheduler, two nannies, two workers"
    assert got == []
    assert inside
    assert "PRIVATE KEY" not in said
    assert not list(tmp_path.glob("emsr-*")), "the folder outlives the run"


def test_who_has_another_certificate_or_none_is_no_client() -> None:
    """Dask's own client, as the same user: what counts is the certificate."""
    with cluster.connect(ClusterConfig(workers=1), 1) as client:
        address = client.scheduler.address
        assert address.startswith("tls://")
        for security in (certificates.in_memory(), None):
            with pytest.raises((OSError, TypeError, RuntimeError)):
                Client(
                    address if security else address.replace("tls", "tcp"),
                    security=security,
                    timeout=3,
                    set_as_default=False,
                )
        assert client.submit(sum, [1, 2]).result(timeout=GUARD_S) == 3


def test_certificates_for_jobs_are_private_files_that_end_with_the_run(tmp_path: Path) -> None:
    with certificates.in_files(tmp_path) as files:
        key, folder = Path(files.key_file), Path(files.key_file).parent
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
        assert second_user.got_in([], [folder, key]) == []
        certificates.of_files(files).get_listen_args("scheduler")
    assert not folder.exists()
    with pytest.raises(ClusterError, match="cannot be written into"), certificates.in_files(tmp_path / "nowhere"):
        pass


def test_files_of_volume_yaml_come_before_those_of_the_run(tmp_path: Path) -> None:
    """None of them is looked for where the file names its own; one that is missing is a message."""
    mine = SecurityConfig(ca_file=f"{tmp_path}/ca", cert_file=f"{tmp_path}/cert", key_file=f"{tmp_path}/key")
    config = ClusterConfig(
        kind="slurm", host="127.0.0.1", security=mine, slurm={"walltime": "01:00:00", "memory": "2GB"}
    )
    with pytest.raises(ClusterError, match=r"cluster\.security\.ca_file .* cannot be read"), cluster.connect(config, 1):
        pass
    assert json.dumps(mine.ca_file)[1:-1] in str(cluster.batch_job(config, 1))


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("tcp://127.0.0.1:9", False),
        ("localhost:9", False),
        ("tcp://192.0.2.1:9", True),
        ("host.invalid:9", True),
        ("tls://192.0.2.1:9", False),
    ],
)
def test_an_open_scheduler_of_others_is_said_once(
    address: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 0.5)
    with pytest.raises(ClusterError), cluster.connect(ClusterConfig(kind="address", address=address), 1):
        pass
    assert capsys.readouterr().err.count("reached without TLS") == warned
