"""Workers as Slurm jobs, through dask-jobqueue: one job, one worker process, at most one GPU."""

from __future__ import annotations

import logging
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, Security

from pipeline.cluster_config import WORKER_ENVIRON, ClusterConfig, walltime_s
from pipeline.errors import ClusterError

JOB_NAME = "emsr"
MARGIN_MOST_S = 300
START_S = 300
"""A worker that has not found the scheduler by then ends its job. Importing torch from a shared disk alone can take more than Dask's 60 s."""

_SETTINGS = {
    # A job that ended is looked for this long (its nanny may be restarting the worker), then another is submitted for it.
    "distributed.deploy.lost-worker-timeout": "30s",
}


def script(config: ClusterConfig, in_flight: int, security: Security | None) -> str:
    """The job script that `run` would submit, with a place holder for the scheduler's address."""
    protocol = None if security is None else "tls://"
    scheduler = f"{protocol or 'tcp://'}SCHEDULER:PORT"
    made = _dask_jobqueue().slurm.SLURMJob(scheduler, name="WORKER", protocol=protocol, security=security, **options(config, in_flight))
    return str(made.job_script())


def options(config: ClusterConfig, in_flight: int) -> dict[str, Any]:
    """What dask-jobqueue makes a job script of."""
    asked = config.slurm
    assert asked is not None
    lifetime, stagger = lifetime_s(walltime_s(asked.walltime))
    gpus = config.gpus_per_worker
    return {
        "job_name": JOB_NAME,
        "queue": asked.partition,
        "account": asked.account,
        "walltime": asked.walltime,
        "memory": asked.memory,
        "job_cpu": asked.cores or in_flight,
        "cores": in_flight,  # dask-jobqueue's word for threads
        "processes": 1,
        "death_timeout": START_S,
        "worker_extra_args": [
            *("--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"),
            *("--memory-limit", "0", "--no-dashboard"),  # Slurm bounds memory; slabs are no Dask data, which alone Dask could spill
        ],
        "job_extra_directives": [*(["--gres=gpu:1"] if gpus else []), *asked.extra_directives],
        "job_script_prologue": [
            *(f"export {name}={value}" for name, value in WORKER_ENVIRON.items()),
            *(["export CUDA_VISIBLE_DEVICES="] if gpus == 0 else []),
            *asked.prologue,
        ],
    }


def lifetime_s(walltime: int) -> tuple[int, int]:
    """When a worker gives back its leases and ends its job, and by how much that is spread; both seconds.

    |------------- lifetime ----------|-- stagger --|-- margin --|   the earliest and latest end lie stagger either side of lifetime
                                                                 walltime
    """
    margin = stagger = min(MARGIN_MOST_S, walltime // 10)
    return max(1, walltime - margin - stagger), stagger


@contextmanager
def jobs(config: ClusterConfig, in_flight: int, security: Security | None) -> Iterator[Client]:
    """A client whose scheduler runs here, at `cluster.host`, and whose workers are jobs; ended ones are replaced."""
    jobqueue = _dask_jobqueue()
    assert config.host is not None
    _try_submission(script(config, in_flight, security))
    at = {"interface": config.host} if config.host in psutil.net_if_addrs() else {"host": config.host}
    with dask.config.set(_SETTINGS):
        try:
            cluster = jobqueue.SLURMCluster(
                **options(config, in_flight),
                scheduler_options={**at, "dashboard_address": "127.0.0.1:0"},
                security=security,
                silence_logs=logging.CRITICAL,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ClusterError(
                f"no scheduler can listen at cluster.host {config.host} ({error})", "an address or network interface of this machine", "See `ip address`"
            ) from None
        with cluster, Client(cluster, set_as_default=False) as client:
            minimum, maximum = config.bounds()
            # adapt, even to a fixed number: alone it submits another job for one that ended.
            cluster.adapt(minimum=minimum, maximum=maximum, target_duration="1s")
            yield client


def queued(cluster: Any) -> bool:
    """Whether Slurm still has a job of the cluster: waiting, starting or running."""
    numbers = [job.job_id for job in list(cluster.workers.values()) if job.job_id]
    if not numbers:
        return False
    found = _call("squeue", "--noheader", "--format=%T", f"--jobs={','.join(numbers)}")
    return bool(found.stdout.split())


def _try_submission(text: str) -> None:
    """Slurm's own opinion of the job script, before anything is submitted. ClusterError with its words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(text, encoding="utf-8")
        found = _call("sbatch", "--test-only", str(path))
    if found.returncode:
        said = " ".join(found.stderr.replace("sbatch: error: ", "").split())
        raise ClusterError(
            f"Slurm would not take the job: {said}", "a job that some partition can run", "Correct cluster.slurm; see `run --dry-run` for the script"
        )


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            f"`{command[0]}` does not answer ({error})", "a machine that may submit Slurm jobs", "Run there, or use another cluster.kind"
        ) from None


def _dask_jobqueue() -> Any:
    try:
        import dask_jobqueue
    except ImportError:
        raise ClusterError("the dask-jobqueue package is not installed", "", "pip install 'emsr[slurm]'") from None
    return dask_jobqueue
