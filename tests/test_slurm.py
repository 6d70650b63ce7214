"""The main job through a real Slurm on this machine: sbatch, walltime, jobs replaced, mistakes that Slurm finds."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import dask
import psutil
import pytest
import second_user
import slurm_here
from certificates import write_certificates
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, texture, tree, volume_yaml, wait_until, write_lr

from pipeline.base.errors import ClusterError
from pipeline.cluster import batch, certificates, job_replacer
from pipeline.cluster import connect as cluster
from pipeline.config import volume as config
from pipeline.config.cluster import ClusterConfig
from pipeline.schedule import check_workers
from pipeline.schedule.crew import Crew

JOB = {"walltime": "01:00:00", "memory": "2GB", "cores": 2}
CLUSTER = {"kind": "slurm", "host": "127.0.0.1", "workers": 1, "slurm": JOB}


@pytest.fixture(scope="module")
def conf() -> Iterator[str]:
    if reason := slurm_here.why_not():
        pytest.skip(reason)
    with slurm_here.slurm() as path:
        yield str(path)


def states(conf: str) -> dict[str, str]:
    """Job number -> state, of jobs that Slurm remembers."""
    said = subprocess.run(
        ["scontrol", "--oneliner", "show", "job"],
        env={**os.environ, "SLURM_CONF": conf},
        capture_output=True,
        text=True,
        check=False,
    )
    return dict(re.findall(r"JobId=(\d+) .*?JobState=(\w+)", said.stdout))


def logged(folder: Path) -> dict[str, object]:
    """JOB, whose output goes to `folder` in place of where the tests were started."""
    return JOB | {"extra_directives": [f"--output={folder}/%j.out"]}


def wait_for(ready: Callable[[], object], client: subprocess.Popen[str]) -> None:
    """The caller goes on once `ready` holds; AssertionError with the client's words where that has ended before."""
    wait_until(lambda: ready() or client.poll() is not None)
    assert client.poll() is None, client.communicate()


def test_a_job_killed_by_its_walltime_is_replaced_and_leaves_no_trace(conf: str, tmp_path: Path) -> None:
    """Slurm ends the only job for its time limit while it holds slabs.

    scontrol has lowered the limit, so that the worker's own lifetime is far off.
    Another job is submitted, over TLS as the first; none is quarantined; every byte is as on undisturbed local workers.
    """
    write_lr(tmp_path / "lr.zarr", texture((6, 40, 32)))
    small = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}
    main_job(volume_yaml(tmp_path / "local.yaml", "lr.zarr", "undisturbed", **small))
    path = volume_yaml(
        tmp_path / "v.yaml", "lr.zarr", "sr", cluster=CLUSTER | {"security": write_certificates(tmp_path)}, **small
    )
    hold = tmp_path / "hold"
    environ = {
        **os.environ,
        "SLURM_CONF": conf,
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
        "DASK_DISTRIBUTED__WORKER__PRELOAD": str(TESTS / "run_standin.py"),  # Slurm hands the environment on to jobs
        "STANDIN_DELAY_S": "0.05",
        "STANDIN_HOLD": str(hold),
    }
    with subprocess.Popen(
        [sys.executable, str(TESTS / "run_standin.py"), str(path)],
        env=environ,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        wait_for(lambda: len(list((tmp_path / "sr").rglob("c/*/*/*"))) > 3, client)
        hold.touch()
        (first,) = states(conf)
        subprocess.run(["scontrol", "update", f"JobId={first}", "TimeLimit=1"], env=environ, check=True)
        wait_for(lambda: states(conf)[first] == "TIMEOUT", client)
        hold.unlink()
        _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == 0, said
    assert '"quarantined": 0' in said
    assert len(states(conf)) >= 2
    assert tree(tmp_path / "sr") == tree(tmp_path / "undisturbed")
    wait_until(lambda: not {"RUNNING", "PENDING", "COMPLETING"} & set(states(conf).values()), "jobs outlive the run")


def test_many_workers_are_one_array_whose_jobs_are_replaced_singly(conf: str, tmp_path: Path) -> None:
    """Three workers are one submission. One of its jobs is cancelled while it holds slabs: that one is replaced."""
    write_lr(tmp_path / "lr.zarr", texture((6, 40, 32)))
    small = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}
    main_job(volume_yaml(tmp_path / "local.yaml", "lr.zarr", "undisturbed", **small))
    path = volume_yaml(
        tmp_path / "v.yaml", "lr.zarr", "sr", cluster=CLUSTER | {"workers": 3, "slurm": logged(tmp_path)}, **small
    )
    hold = tmp_path / "hold"
    before = set(states(conf))
    environ = {
        **os.environ,
        "SLURM_CONF": conf,
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
        "DASK_DISTRIBUTED__WORKER__PRELOAD": str(TESTS / "run_standin.py"),
        "STANDIN_DELAY_S": "0.05",
        "STANDIN_HOLD": str(hold),
    }
    with subprocess.Popen(
        [sys.executable, str(TESTS / "run_standin.py"), str(path)],
        env=environ,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        wait_for(lambda: len(list((tmp_path / "sr").rglob("c/*/*/*"))) > 3, client)
        hold.touch()
        elements = queue(conf)
        arrays = {element.partition("_")[0] for element in elements}
        assert sorted(elements) == [f"{array}_{i}" for array in arrays for i in range(3)]
        subprocess.run(["scancel", elements[0]], env=environ, check=True)
        wait_for(lambda: elements[0] not in queue(conf), client)
        wait_for(lambda: len(queue(conf)) == 3, client)
        hold.unlink()
        _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == 0, said
    assert '"quarantined": 0' in said
    assert len(set(states(conf)) - before) == 4
    assert tree(tmp_path / "sr") == tree(tmp_path / "undisturbed")
    wait_until(lambda: not queue(conf), "jobs outlive the run")


def queue(conf: str) -> list[str]:
    """The jobs that have not ended."""
    said = subprocess.run(
        ["squeue", "--noheader", "--array", "--format=%i"],
        env={**os.environ, "SLURM_CONF": conf},
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(said.stdout.split())


def test_a_job_that_ends_before_its_worker_comes_is_replaced(conf: str, tmp_path: Path) -> None:
    """The first job finds its node unfit (the prologue ends it), the second one does the work."""
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    unfit = f"mkdir {tmp_path}/fit 2>/dev/null && exit 1"
    path = volume_yaml(
        tmp_path / "v.yaml",
        "lr.zarr",
        "sr",
        cluster=CLUSTER | {"slurm": logged(tmp_path) | {"prologue": [unfit]}},
        network__name="nearest",
    )
    before = states(conf)
    said = main_job(path, "run", SLURM_CONF=conf)
    assert "1 written" in said.stdout
    first, _ = sorted(int(number) for number in states(conf) if number not in before)
    assert states(conf)[str(first)] == "FAILED"


def test_jobs_that_all_end_before_a_worker_comes_end_the_run(
    conf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prologue that fails everywhere: after three jobs one message names them, and nothing was written."""
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    broken = CLUSTER | {"slurm": logged(tmp_path) | {"prologue": ["exit 1"]}}
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=broken, network__name="nearest")
    number = len(states(conf))
    monkeypatch.setenv("SLURM_CONF", conf)
    monkeypatch.setattr(job_replacer, "LOOK_S", 1.0)
    monkeypatch.setattr(check_workers, "SAY_S", 2.0)
    with (
        pytest.raises(ClusterError, match="ended before a worker answered"),
        cluster.connect(config.load(path).cluster, 2) as client,
    ):
        check_workers.wait_for_worker(client, Crew(client))
    assert len(states(conf)) == number + job_replacer.MAX_IN_VAIN
    assert not (tmp_path / "sr").exists()


def test_a_whole_run_inside_one_allocation(conf: str, tmp_path: Path) -> None:
    """deploy/slurm/allocation.sbatch: scheduler, worker and client in one job, over TLS; the client's exit code."""
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"kind": "address", "address": f"tls://127.0.0.1:{port}", "security": write_certificates(tmp_path)}
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=there)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "SLURM_CONF": conf, "PYTHONPATH": str(REPOSITORY), "PATH": tools, "EMSR_PORT": str(port)}
    log = tmp_path / "log"
    command = [
        "sbatch",
        "--wait",
        "--ntasks=1",
        "--mem=4G",
        "--time=30",
        f"--output={log}",
        str(REPOSITORY / "deploy" / "slurm" / "allocation.sbatch"),
    ]
    ended = subprocess.run([*command, str(path)], env=environ, cwd=tmp_path, check=False, timeout=GUARD_S)
    assert ended.returncode == 0, log.read_text()
    assert "0 quarantined" in log.read_text()


ODD = """-a "folder" it's $HOME `id` \\ & ;#"""
"""The name of a folder with what shells read in their own way."""


def test_a_run_in_an_odd_folder_lets_no_second_user_in(conf: str, tmp_path: Path) -> None:
    """Nobody wrote certificates for it. All ports of client and job are tried, and the folder that holds the key.

    Python, the current folder and the certificates lie under a name that a shell would read in its own way.
    """
    if reason := second_user.why_not():
        pytest.skip(reason)
    odd = tmp_path / ODD
    odd.mkdir()
    (odd / "python").symlink_to(sys.executable)
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=CLUSTER, network__name="nearest")
    hold = tmp_path / "hold"
    hold.touch()
    tmp_path.chmod(0o755)
    environ = {
        **os.environ,
        "SLURM_CONF": conf,
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}:{sysconfig.get_path('purelib')}",
        "DASK_DISTRIBUTED__WORKER__PRELOAD": str(TESTS / "run_standin.py"),
        "STANDIN_HOLD": str(hold),
    }
    with subprocess.Popen(
        [str(odd / "python"), str(TESTS / "run_standin.py"), str(path)],
        env=environ,
        cwd=odd,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        wait_for((tmp_path / "sr.emsr" / "plan.json").exists, client)
        (private,) = odd.glob(".emsr-tls-*")
        job = [p for p in psutil.process_iter(["cmdline"]) if f"{private}/key.pem" in (p.info["cmdline"] or ())]
        processes = [psutil.Process(client.pid), *job, *(child for p in job for child in p.children(recursive=True))]
        ports = second_user.listening(processes)
        got = second_user.got_in(ports, [private, *private.iterdir()])
        hold.unlink()
        _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == 0, said
    assert '"quarantined": 0' in said
    assert job
    assert len(ports) >= 3, "scheduler, nanny, worker"
    assert got == []
    assert not private.exists(), "the key outlives the run"


def test_paths_in_the_job_script_are_one_word_each() -> None:
    """Also with a line's end in them."""
    path = f"/home/{ODD}\n/key.pem"
    script = batch.script(ClusterConfig(**CLUSTER), 1, certificates.security(path, path, path))
    worker = shlex.split(script[script.index(shlex.quote(sys.executable)) :])
    assert [worker[worker.index(flag) + 1] for flag in ("--tls-ca-file", "--tls-cert", "--tls-key")] == [path] * 3
    settings = JOB | {"partition": "a b", "account": "c'd"}
    script = batch.script(ClusterConfig(**CLUSTER | {"slurm": settings}), 1, None)
    assert "#SBATCH -p 'a b'\n" in script
    assert shlex.split(script[script.index("-A ") :].splitlines()[0]) == ["-A", "c'd"]


def test_what_slurm_would_refuse_is_one_message(conf: str, tmp_path: Path) -> None:
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    path = volume_yaml(
        tmp_path / "v.yaml", "lr.zarr", "sr", cluster=CLUSTER | {"slurm": JOB | {"partition": "nowhere"}}
    )
    before = tree(tmp_path)
    said = main_job(path, "run", check=False, SLURM_CONF=conf)
    assert said.returncode == 2, said.stderr
    assert "Slurm would not take the job" in said.stderr
    assert "invalid partition" in said.stderr
    assert "Traceback" not in said.stderr
    assert tree(tmp_path) == before


def test_no_slurm_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="`sbatch` does not answer"), cluster.connect(ClusterConfig(**CLUSTER), 2):
        pass


def test_a_site_that_forbids_the_scheduler(conf: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not cluster.host that is named."""
    monkeypatch.setenv("SLURM_CONF", conf)
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__PRELOAD", "['no_such_module']")
    monkeypatch.chdir(tmp_path)
    with (
        dask.config.set({"distributed.scheduler.preload": ["no_such_module"]}),
        pytest.raises(ClusterError, match=r"no_such_module.*DASK_DISTRIBUTED__SCHEDULER__PRELOAD"),
        cluster.connect(ClusterConfig(**CLUSTER), 1),
    ):
        pass
    with (
        pytest.raises(ClusterError, match=r"no scheduler can listen at cluster\.host 192\.0\.2\.1"),
        cluster.connect(ClusterConfig(**CLUSTER | {"host": "192.0.2.1"}), 1),
    ):
        pass
    assert not list(tmp_path.iterdir()), "certificates are left"


def test_the_job_script() -> None:
    """One process and its threads, one GPU, a lifetime that ends before the walltime does, and the user's own lines."""
    settings = JOB | {
        "partition": "gpu",
        "account": "em",
        "prologue": ["module load cuda"],
        "extra_directives": ["--constraint=a100"],
    }
    script = batch.script(ClusterConfig(**CLUSTER | {"slurm": settings, "gpus_per_worker": 1}), 3, None)
    for line in (
        "-p gpu",
        "-A em",
        "-t 01:00:00",
        "--mem=2G",
        "--cpus-per-task=2",
        "--gres=gpu:1",
        "--constraint=a100",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\n" in script
    assert "--nthreads 3" in script
    assert "--death-timeout 300" in script
    assert "--nworkers" not in script
    assert "--lifetime 3000s --lifetime-stagger 300s" in script
    without = batch.script(ClusterConfig(**CLUSTER | {"gpus_per_worker": 0}), 1, None)
    assert "gres" not in without
    assert "export CUDA_VISIBLE_DEVICES=\n" in without


def test_the_file_in_deploy_makes_a_script() -> None:
    loaded = config.load(REPOSITORY / "deploy" / "slurm" / "volume.yaml")
    script = cluster.batch_job(loaded.cluster, cluster.slabs_in_flight(loaded))
    assert script is not None
    assert "#SBATCH --gres=gpu:1\n" in script
    assert "tls://SCHEDULER:PORT" in script
    assert "--tls-ca-file FOLDER/cert.pem" in script, "certificates are the run's own"


@pytest.mark.parametrize(
    ("walltime", "expected"), [(86400, (85800, 300)), (3600, (3000, 300)), (600, (480, 60)), (60, (48, 6)), (5, (5, 0))]
)
def test_lifetimes_end_before_the_walltime(walltime: int, expected: tuple[int, int]) -> None:
    assert batch.lifetime_s(walltime) == expected
    assert sum(expected) <= walltime
