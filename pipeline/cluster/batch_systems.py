"""What differs between batch systems: how a job states what it asks for, how many are submitted together, and how to
ask which of them are there.
"""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import ClusterError
from pipeline.config.cluster import (
    ClusterConfig,
    LsfConfig,
    PbsConfig,
    SgeConfig,
    SlurmConfig,
    walltime_s,
)

MAX_ARRAY = 1000
"""Jobs of one array at most: Slurm's own default is 1001 (MaxArraySize)."""


@dataclass(frozen=True)
class System:
    """One batch system. `name` is the word for it in messages, `kind` its `cluster.kind` and its part of the file.

    `cluster` is dask-jobqueue's class. `submit` is given the path of a job script, or, `by_stdin`, the script itself on
    standard input; `test` reads one there and submits nothing (None where there is no such command). `options` gives
    what dask-jobqueue is told for this system alone. `jobs` gives the state of each job of this user that has not
    ended, by number; None where the system does not say. `detail` says why a job waits. `array_size` is how many jobs
    one submission may hold; `index` is the shell variable that counts them from 0. `output` says where what a job
    prints is found.
    """

    name: str
    kind: str
    cluster: str
    submit: tuple[str, ...]
    cancel: tuple[str, ...]
    test: tuple[str, ...] | None
    options: Callable[[ClusterConfig, int], dict[str, Any]]
    jobs: Callable[[], dict[str, str] | None]
    detail: Callable[[str], str]
    output: str
    array_size: Callable[[], int] = lambda: 1
    index: str = ""
    by_stdin: bool = False


def _slurm_options(config: ClusterConfig, cores: int) -> dict[str, Any]:
    settings = _settings(config, SlurmConfig)
    return {
        "queue": settings.partition,
        "account": settings.account,
        "walltime": settings.walltime,
        "job_cpu": cores,
        "job_extra_directives": ["--gres=gpu:1"] if config.gpus_per_worker else [],
    }


def _lsf_options(config: ClusterConfig, cores: int) -> dict[str, Any]:
    settings = _settings(config, LsfConfig)
    hours, minutes, _ = _clock(settings.walltime)
    return {
        "queue": settings.queue,
        "project": settings.project,
        "walltime": f"{hours}:{minutes:02}",
        "ncpus": cores,
        "job_extra_directives": ['-gpu "num=1"'] if config.gpus_per_worker else [],
    }


def _pbs_options(config: ClusterConfig, cores: int) -> dict[str, Any]:
    settings = _settings(config, PbsConfig)
    gpu = ":ngpus=1" if config.gpus_per_worker else ""
    return {
        "queue": settings.queue,
        "account": settings.account,
        "walltime": "{}:{:02}:{:02}".format(*_clock(settings.walltime)),
        "resource_spec": f"select=1:ncpus={cores}:mem={_mib(settings.memory)}mb{gpu}",
        "job_extra_directives": ["-V", "-S /bin/bash", "-j oe"],
        "job_script_prologue": ['cd "${PBS_O_WORKDIR:-.}"'],
    }


def _sge_options(config: ClusterConfig, cores: int) -> dict[str, Any]:
    settings = _settings(config, SgeConfig)
    environment = settings.parallel_environment
    if environment is None and cores > 1:
        raise ClusterError(
            f"a job takes {cores} cores and cluster.sge.parallel_environment is not given",
            "the parallel environment that gives a job several slots of one host",
            "`qconf -spl` lists those of the site; or give cluster.sge.cores: 1",
        )
    return {
        "queue": settings.queue,
        "project": settings.project,
        "walltime": "{}:{:02}:{:02}".format(*_clock(settings.walltime)),
        "resource_spec": f"{settings.memory_resource}={_mib(settings.memory)}M",
        "job_extra_directives": [
            "-V",
            "-S /bin/bash",
            *([f"-pe {environment} {cores}"] if environment else []),
            *(["-l gpu=1"] if config.gpus_per_worker else []),
        ],
    }


def _settings(config: ClusterConfig, kind: type[Any]) -> Any:
    settings = config.jobs
    assert isinstance(settings, kind)
    return settings


def _clock(walltime: str) -> tuple[int, int, int]:
    minutes, seconds = divmod(walltime_s(walltime), 60)
    return minutes // 60, minutes % 60, seconds


def _mib(size: int) -> int:
    return -(-size // 2**20)


def _slurm_jobs() -> dict[str, str] | None:
    found = call("squeue", "--noheader", "--me", "--array", "--format=%i|%T|%r")
    if found.returncode:
        return None
    lines = (line.split("|", 2) for line in found.stdout.splitlines())
    return {line[0]: f"{line[1]} ({line[2]})" for line in lines if len(line) == 3}


def _slurm_array_size() -> int:
    """How many jobs one array may hold, as the site has configured it; 1 where it has none."""
    found = call("scontrol", "show", "config")
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", found.stdout, re.MULTILINE)
    return max(1, min(MAX_ARRAY, int(size[1]) if size else 1))


def _lsf_jobs() -> dict[str, str] | None:
    found = call("bjobs", "-noheader", "-o", "jobid stat pend_reason delimiter='|'")
    if found.returncode and "No unfinished job" not in found.stderr:
        return None
    lines = (line.split("|", 2) for line in found.stdout.splitlines())
    return {line[0].strip(): _with_reason(line[1], line[2]) for line in lines if len(line) == 3}


def _pbs_jobs() -> dict[str, str] | None:
    """`qstat` lists jobs of everybody: Job id, Name, User, Time Use, S, Queue. Torque shows ended ones (C) a while."""
    found = call("qstat")
    if found.returncode:
        return None
    rows = [line.split() for line in found.stdout.splitlines() if line[:1].isdigit()]
    return {re.split(r"\D", row[0])[0]: row[-2] for row in rows if len(row) >= 5 and row[-2] not in ("C", "F")}


def _pbs_detail(number: str) -> str:
    found = call("qstat", "-f", number)
    comment = re.search(r"^\s*comment = (.*(?:\n\t.*)*)", found.stdout, re.MULTILINE)
    return " ".join(comment[1].split()) if comment else ""


def _sge_jobs() -> dict[str, str] | None:
    """Columns of `qstat`: job-ID, prior, name, user, state, ..."""
    found = call("qstat", "-u", getpass.getuser())
    if found.returncode:
        return None
    rows = [line.split() for line in found.stdout.splitlines()]
    return {row[0]: row[4] for row in rows if len(row) > 4 and row[0].isdigit()}


def _sge_detail(number: str) -> str:
    found = call("qstat", "-j", number)
    reasons = re.search(r"^(?:scheduling info|error reason\s+\d+):\s*(.+)", found.stdout, re.MULTILINE)
    return reasons[1].strip() if reasons else ""


def _no_detail(number: str) -> str:
    return ""


def _with_reason(state: str, reason: str) -> str:
    reason = reason.strip()
    return f"{state} ({reason})" if reason not in ("", "-") else state


SYSTEMS = {
    system.kind: system
    for system in (
        System(
            name="Slurm",
            kind="slurm",
            cluster="SLURMCluster",
            submit=("sbatch",),
            cancel=("scancel",),
            test=("sbatch", "--test-only"),
            options=_slurm_options,
            jobs=_slurm_jobs,
            detail=_no_detail,
            output="slurm-JOBID.out",
            array_size=_slurm_array_size,
            index="SLURM_ARRAY_TASK_ID",
        ),
        System(
            name="LSF",
            kind="lsf",
            cluster="LSFCluster",
            submit=("bsub",),
            cancel=("bkill",),
            test=None,
            options=_lsf_options,
            jobs=_lsf_jobs,
            detail=_no_detail,
            by_stdin=True,
            output="the mail of the job, or the file that -o names in extra_directives",
        ),
        System(
            name="PBS",
            kind="pbs",
            cluster="PBSCluster",
            submit=("qsub",),
            cancel=("qdel",),
            test=None,
            options=_pbs_options,
            jobs=_pbs_jobs,
            detail=_pbs_detail,
            output="emsr.oJOBID",
        ),
        System(
            name="SGE",
            kind="sge",
            cluster="SGECluster",
            submit=("qsub",),
            cancel=("qdel",),
            test=None,
            options=_sge_options,
            jobs=_sge_jobs,
            detail=_sge_detail,
            output="emsr.oJOBID",
        ),
    )
}


def call(*command: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command of a batch system, `given` on its standard input. ClusterError where it does not answer."""
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            f"`{command[0]}` does not answer ({error})",
            "a machine that may submit jobs",
            "Run there, or use another cluster.kind",
        ) from None


def in_words(said: Sequence[str]) -> str:
    """What a command has printed, as one line."""
    return " ".join(" ".join(said).replace("sbatch: error: ", "").split())
