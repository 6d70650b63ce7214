"""Workers as jobs of a batch system, through dask-jobqueue: one job, one worker process, at most one GPU."""

from __future__ import annotations

import copy
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, Security
from distributed.deploy.spec import ProcessInterface

from pipeline.base.errors import ClusterError
from pipeline.base.waits import closing, waiting
from pipeline.cluster import certificates
from pipeline.cluster.batch_systems import SYSTEMS, System, call, in_words
from pipeline.cluster.job_replacer import MAX_IN_VAIN, JobReplacer
from pipeline.cluster.job_submitter import JobSubmitter
from pipeline.cluster.patient_client import PatientClient
from pipeline.cluster.site_settings import first_cause
from pipeline.config.cluster import WORKER_ENVIRON, ClusterConfig, walltime_s

JOB_NAME = "emsr"
MAX_MARGIN_S = 300
START_S = 300
"""A worker that has not found the scheduler after so long ends its job.

Dask's own 60 s are too few where torch is imported from a shared disk.
"""

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
    system = SYSTEMS[config.kind]
    security = security or certificates.security("FOLDER/cert.pem", "FOLDER/cert.pem", "FOLDER/key.pem")
    made = _cluster_class(system).job_cls(
        "tls://SCHEDULER:PORT",
        name="WORKER",
        protocol="tls://",
        security=_quoted(security),
        **options(config, in_flight),
    )
    return str(made.job_script())


def shared_folder(kind: str) -> Path:
    """Where files lie that jobs must see: what dask-jobqueue's configuration names, or the current folder, where jobs
    begin.
    """
    named = dask.config.get(f"jobqueue.{kind}.shared-temp-directory", None)
    return Path(os.path.expanduser(os.path.expandvars(named))) if named else Path.cwd()


def options(config: ClusterConfig, in_flight: int) -> dict[str, Any]:
    """What dask-jobqueue makes a job script of."""
    settings = config.jobs
    assert settings is not None
    lifetime, stagger = lifetime_s(walltime_s(settings.walltime))
    own = SYSTEMS[config.kind].options(config, settings.cores or config.cores(in_flight))
    quoted = {key: shlex.quote(own[key]) for key in ("queue", "account", "project") if own.get(key)}
    return {
        **own,
        **quoted,
        "job_name": JOB_NAME,
        "python": shlex.quote(sys.executable),
        "memory": settings.memory,
        "cores": in_flight,  # dask-jobqueue's word for threads
        "processes": 1,
        "death_timeout": START_S,
        "worker_extra_args": [
            *("--lifetime", f"{lifetime}s", "--lifetime-stagger", f"{stagger}s"),
            # The batch system bounds memory; slabs are no Dask data, which alone Dask could spill.
            *("--memory-limit", "0", "--no-dashboard"),
        ],
        "job_extra_directives": [*own.get("job_extra_directives", []), *settings.extra_directives],
        "job_script_prologue": [
            *own.get("job_script_prologue", []),
            *(f"export {name}={shlex.quote(value)}" for name, value in WORKER_ENVIRON.items()),
            *PRIVATE_FOLDER,
            *(["export CUDA_VISIBLE_DEVICES="] if config.gpus_per_worker == 0 else []),
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
    system = SYSTEMS[config.kind]
    cluster_class = _cluster_class(system)
    assert config.host is not None
    _try_submission(system, script(config, in_flight, security))
    submitter = JobSubmitter(system, system.array_size())
    at = {"interface": config.host} if config.host in psutil.net_if_addrs() else {"host": config.host}
    with dask.config.set(_SETTINGS):
        try:
            cluster = cluster_class(
                **options(config, in_flight),
                submitter=submitter,
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
            closing(cluster, f"{system.name} to cancel the jobs"),
            PatientClient(cluster, set_as_default=False) as client,
            JobReplacer(cluster, system, submitter) as cluster.replacing,
        ):
            if config.adapt is None:
                cluster.scale(config.bounds()[1])
            else:
                cluster.adapt(minimum=config.adapt.minimum, maximum=config.adapt.maximum, target_duration="1s")
            yield client


def is_ours(cluster: Any) -> bool:
    """Whether `jobs` has made this cluster."""
    return isinstance(getattr(cluster, "replacing", None), JobReplacer)


def queued(cluster: Any) -> bool:
    """Whether a worker may still come: the batch system has a job of the cluster, or will be given one.

    Raises ClusterError where jobs end in vain, or none is taken.
    """
    replacing: JobReplacer = cluster.replacing
    system, submitter = replacing.system, replacing.submitter
    if len(replacing.in_vain) >= MAX_IN_VAIN:
        raise ClusterError(
            f"jobs of {system.name} ({', '.join(replacing.in_vain[:MAX_IN_VAIN])}) ended before a worker answered",
            "jobs whose Python has emsr and which reach cluster.host",
            f"Read their output ({system.output}, where the client was started)",
        )
    if submitter.refusals >= (MAX_IN_VAIN if submitter.taken else 1) and not replacing.numbers():
        raise _not_taken(system, submitter.refused)
    return bool(cluster.workers)


def why_none(cluster: Any) -> str:
    """Why no worker has come yet: what the batch system says of the cluster's jobs."""
    replacing: JobReplacer = cluster.replacing
    system, submitter = replacing.system, replacing.submitter
    numbers = replacing.numbers()
    if not numbers:
        refused = f"{system.name} takes no job: {submitter.refused}"
        return refused if submitter.refused else f"{system.submit[0]} has given no job a number yet"
    try:
        with waiting(f"{system.name}, to say why jobs wait"):
            found = system.jobs()
            states = {number: state for number, state in (found or {}).items() if number in numbers}
            shown = [
                " ".join(filter(None, (f"job {number} is {states[number]}", system.detail(number))))
                for number in sorted(states)[:SHOWN]
            ]
    except ClusterError as error:
        return error.saw
    if found is None:
        return f"{system.name} does not say what its jobs do"
    return ", ".join(shown) + (f" and {len(states) - SHOWN} more" if len(states) > SHOWN else "")


def _try_submission(system: System, text: str) -> None:
    """The batch system's own opinion of the job script, before anything is submitted. ClusterError with its words."""
    if system.test is None:
        return
    with waiting(" ".join(system.test)):
        found = call(*system.test, given=text)
    if found.returncode:
        raise _not_taken(system, in_words([found.stderr, found.stdout]))


def _not_taken(system: System, said: str) -> ClusterError:
    return ClusterError(
        f"{system.name} would not take the job: {said}",
        "a job that the site can run",
        f"Correct cluster.{system.kind}; see `run --dry-run` for the script",
    )


def _cluster_class(system: System) -> Any:
    """dask-jobqueue's cluster, whose job scripts hold paths as the shell reads them, and go to the batch system by
    `JobSubmitter`.
    """
    try:
        import dask_jobqueue
    except ImportError:
        raise ClusterError("the dask-jobqueue package is not installed", "", "pip install 'emsr[batch]'") from None
    base: Any = getattr(dask_jobqueue, system.cluster)

    class Job(base.job_cls):  # type: ignore[misc]
        def __init__(self, *args: Any, submitter: JobSubmitter | None = None, **options: Any) -> None:
            super().__init__(*args, **options)
            self.submitter = submitter

        async def start(self) -> None:
            assert self.submitter is not None
            self.job_id = await self.submitter.submit(self)
            await ProcessInterface.start(self)

        async def close(self) -> None:
            if self.job_id is not None and self.submitter is not None:
                await self.submitter.cancel(self.job_id)
            await ProcessInterface.close(self)

    class BatchCluster(base):  # type: ignore[misc]
        job_cls = Job

        def _get_worker_security(self, security: Security) -> Security:
            return _quoted(security)

    return BatchCluster


def _quoted(security: Security) -> Security:
    """The same with paths for a shell: dask-jobqueue writes them into the script as they are."""
    quoted = copy.copy(security)
    for name in ("tls_ca_file", "tls_worker_cert", "tls_worker_key"):
        setattr(quoted, name, shlex.quote(getattr(security, name)))
    return quoted
