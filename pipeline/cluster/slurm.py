"""Workers as Slurm jobs, through dask-jobqueue: one job, one worker process, at most one GPU."""

from __future__ import annotations

import copy
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, Security

from pipeline.base.errors import ClusterError
from pipeline.base.waits import closing, waiting
from pipeline.cluster import certificates
from pipeline.cluster.patient_client import PatientClient
from pipeline.cluster.site_settings import first_cause
from pipeline.config.cluster import WORKER_ENVIRON, ClusterConfig, walltime_s

JOB_NAME = "emsr"
MAX_MARGIN_S = 300
START_S = 300
"""A worker that has not found the scheduler after so long ends its job.

Dask's own 60 s are too few where torch is imported from a shared disk.
"""

LOOK_S = 15.0
"""How often Slurm is asked which jobs it has. Those that it has no more are submitted again."""
MAX_IN_VAIN = 3
"""Where so many jobs end one after the other before the worker of any has come, something is wrong with all of them."""
SHOWN = 3
"""So many jobs are named of those that wait."""

PRIVATE_FOLDER = (
    'export DASK_TEMPORARY_DIRECTORY="$(mktemp -d -t emsr.XXXXXX)"',
    """trap 'rm -rf "$DASK_TEMPORARY_DIRECTORY"' EXIT""",
)
"""Lines of the job script: they make a folder for the worker's files that no other user of the node can enter."""

_SETTINGS = {
    # Which job has ended is Slurm's to say: a worker that is gone may be restarting, and a job that never had one ends
    # unseen.
    "distributed.deploy.lost-worker-timeout": "1000 days",
}


def script(config: ClusterConfig, in_flight: int, security: Security | None) -> str:
    """The job script that `run` would submit, with place holders: the scheduler's address, and, without `security`, the
    folder of the run's own certificates.
    """
    security = security or certificates.security("FOLDER/cert.pem", "FOLDER/cert.pem", "FOLDER/key.pem")
    made = _cluster_class().job_cls(
        "tls://SCHEDULER:PORT",
        name="WORKER",
        protocol="tls://",
        security=_quoted(security),
        **options(config, in_flight),
    )
    return str(made.job_script())


def shared_folder() -> Path:
    """Where files lie that jobs must see: what dask-jobqueue's configuration names, or the current folder, where jobs
    begin.
    """
    named = dask.config.get("jobqueue.slurm.shared-temp-directory", None)
    return Path(os.path.expanduser(os.path.expandvars(named))) if named else Path.cwd()


def options(config: ClusterConfig, in_flight: int) -> dict[str, Any]:
    """What dask-jobqueue makes a job script of."""
    settings = config.slurm
    assert settings is not None
    lifetime, stagger = lifetime_s(walltime_s(settings.walltime))
    gpus = config.gpus_per_worker
    return {
        "job_name": JOB_NAME,
        "python": shlex.quote(sys.executable),
        "queue": settings.partition and shlex.quote(settings.partition),
        "account": settings.account and shlex.quote(settings.account),
        "walltime": settings.walltime,
        "memory": settings.memory,
        "job_cpu": settings.cores or config.cores(in_flight),
        "cores": in_flight,  # dask-jobqueue's word for threads
        "processes": 1,
        "death_timeout": START_S,
        "worker_extra_args": [
            *("--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"),
            *(
                "--memory-limit",
                "0",
                "--no-dashboard",
            ),  # Slurm bounds memory; slabs are no Dask data, which alone Dask could spill
        ],
        "job_extra_directives": [*(["--gres=gpu:1"] if gpus else []), *settings.extra_directives],
        "job_script_prologue": [
            *(f"export {name}={shlex.quote(value)}" for name, value in WORKER_ENVIRON.items()),
            *PRIVATE_FOLDER,
            *(["export CUDA_VISIBLE_DEVICES="] if gpus == 0 else []),
            *settings.prologue,
        ],
    }


def lifetime_s(walltime: int) -> tuple[int, int]:
    """When a worker gives back its leases and ends its job, and by how much that is spread; both seconds.

    |------------- lifetime ----------|-- stagger --|-- margin --|   a job ends up to a stagger before or after
                                                                 walltime                   its lifetime
    """
    margin = stagger = min(MAX_MARGIN_S, walltime // 10)
    return max(1, walltime - margin - stagger), stagger


@contextmanager
def jobs(config: ClusterConfig, in_flight: int, security: Security) -> Iterator[Client]:
    """A client whose scheduler runs here, at `cluster.host`, and whose workers are jobs; ended ones are replaced.

    `security` names files, which jobs must see.
    """
    cluster_class = _cluster_class()
    assert config.host is not None
    _try_submission(script(config, in_flight, security))
    at = {"interface": config.host} if config.host in psutil.net_if_addrs() else {"host": config.host}
    with dask.config.set(_SETTINGS):
        try:
            cluster = cluster_class(
                **options(config, in_flight),
                scheduler_options={**at, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
                security=security,
                silence_logs=logging.CRITICAL,
            )
        except (OSError, ValueError, RuntimeError) as error:
            cause = first_cause(error)
            if isinstance(cause, FileNotFoundError) or not isinstance(cause, OSError | ValueError):
                raise  # nothing is wrong with the address
            raise ClusterError(
                f"no scheduler can listen at cluster.host {config.host} ({cause})",
                "an address or network interface of this machine",
                "See `ip address`",
            ) from None
        with (
            closing(cluster, "Slurm to cancel the jobs"),
            PatientClient(cluster, set_as_default=False) as client,
            JobReplacer(cluster) as cluster.replacing,
        ):
            if config.adapt is None:
                cluster.scale(config.bounds()[1])
            else:
                cluster.adapt(minimum=config.adapt.minimum, maximum=config.adapt.maximum, target_duration="1s")
            yield client


def queued(cluster: Any) -> bool:
    """Whether a worker may still come: Slurm has a job of the cluster, or will be given one. Raises ClusterError where
    jobs end in vain.
    """
    in_vain = cluster.replacing.in_vain
    if len(in_vain) >= MAX_IN_VAIN:
        raise ClusterError(
            f"jobs of Slurm ({', '.join(in_vain[:MAX_IN_VAIN])}) ended before a worker answered",
            "jobs whose Python has emsr and which reach cluster.host",
            "Read their output (slurm-JOBID.out, where the client was started)",
        )
    return bool(cluster.workers)


def why_none(cluster: Any) -> str:
    """Why no worker has come yet: what Slurm says of the cluster's jobs."""
    numbers = {job.job_id for job in list(cluster.workers.values()) if job.job_id}
    if not numbers:
        return "sbatch has given no job a number yet"
    try:
        with waiting("squeue, to say why jobs wait"):
            found = _call("squeue", "--noheader", "--me", "--format=%i|%T|%r")
    except ClusterError as error:
        return error.saw
    if found.returncode:
        return f"squeue fails ({' '.join(found.stderr.split())})"
    jobs = [line.split("|") for line in found.stdout.splitlines() if line.split("|")[0] in numbers]
    shown = ", ".join(f"job {number} is {state} ({reason})" for number, state, reason in jobs[:SHOWN])
    return shown + (f" and {len(jobs) - SHOWN} more" if len(jobs) > SHOWN else "")


class JobReplacer:
    """Submits a job again that Slurm has no more: its walltime is over, its node is lost, or it ended before its worker
    came.

    A thread of its own, while the `with` lasts. A job that ended before its worker came is replaced later each time,
    until one comes.
    """

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_again, name="emsr-slurm", daemon=True)
        self._came: set[str] = set()
        self._failures, self._not_before = 0, 0.0
        self.in_vain: list[str] = []
        """Numbers of the jobs that ended before their worker came, since there was a worker."""

    def __enter__(self) -> JobReplacer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(60)

    def _look_again(self) -> None:
        while not self._ended.wait(LOOK_S):
            with suppress(ClusterError):  # Slurm does not answer: it is asked again
                self._look()

    def _look(self) -> None:
        jobs = {job.job_id: name for name, job in list(self._cluster.workers.items()) if job.job_id}
        there = {worker["name"] for worker in self._cluster.scheduler_info["workers"].values()}
        # Slurm is asked after the cluster: a job submitted in between is not missed.
        found = _call("squeue", "--noheader", "--me", "--format=%i")
        if found.returncode:
            return
        came = {number for number, name in jobs.items() if name in there} | self._came & jobs.keys()
        if came - self._came:
            self._failures = 0
        self._came = came
        if there:
            self.in_vain = []
        gone = jobs.keys() - set(found.stdout.split())
        early = gone - came
        if time.monotonic() < self._not_before:
            gone -= early
        elif early:
            self._failures += 1
            self._not_before = time.monotonic() + LOOK_S * 2 ** min(self._failures, 6)
            self.in_vain += [] if there else sorted(early - set(self.in_vain))
        if gone and len(self.in_vain) < MAX_IN_VAIN:
            self._cluster.sync(self._replace, {number: jobs[number] for number in gone})

    async def _replace(self, gone: dict[str, Any]) -> None:
        for number, name in gone.items():
            job = self._cluster.workers.get(name)
            if job is not None and job.job_id == number:
                del self._cluster.workers[name]
        self._cluster.scale(len(self._cluster.worker_spec))  # opens what is wanted and not there


def _try_submission(text: str) -> None:
    """Slurm's own opinion of the job script, before anything is submitted. ClusterError with its words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(text, encoding="utf-8")
        with waiting("sbatch --test-only"):
            found = _call("sbatch", "--test-only", str(path))
    if found.returncode:
        said = " ".join(found.stderr.replace("sbatch: error: ", "").split())
        raise ClusterError(
            f"Slurm would not take the job: {said}",
            "a job that some partition can run",
            "Correct cluster.slurm; see `run --dry-run` for the script",
        )


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            f"`{command[0]}` does not answer ({error})",
            "a machine that may submit Slurm jobs",
            "Run there, or use another cluster.kind",
        ) from None


def _cluster_class() -> Any:
    """dask-jobqueue's cluster, whose job scripts hold paths as the shell reads them, and lie where nobody else writes.

    Its own lie under a name in /tmp that is free for a moment.
    """
    try:
        import dask_jobqueue
    except ImportError:
        raise ClusterError("the dask-jobqueue package is not installed", "", "pip install 'emsr[slurm]'") from None

    class Job(dask_jobqueue.slurm.SLURMJob):  # type: ignore[misc]
        @contextmanager
        def job_file(self) -> Iterator[str]:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "job.sh"
                path.write_text(self.job_script(), encoding="utf-8")
                yield str(path)

    class SLURMCluster(dask_jobqueue.SLURMCluster):  # type: ignore[misc]
        job_cls = Job

        def _get_worker_security(self, security: Security) -> Security:
            return _quoted(security)

    return SLURMCluster


def _quoted(security: Security) -> Security:
    """The same with paths for a shell: dask-jobqueue writes them into the script as they are."""
    quoted = copy.copy(security)
    for name in ("tls_ca_file", "tls_worker_cert", "tls_worker_key"):
        setattr(quoted, name, shlex.quote(getattr(security, name)))
    return quoted
