"""The `cluster` part of volume.yaml: how Dask workers are started or found."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from pipeline.config import yaml_file
from pipeline.config.yaml_file import Bytes

WORKER_ENVIRON = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "300s",
    "DASK_DISTRIBUTED__WORKER__HTTP__ROUTES": "[]",
    "PYTHONSAFEPATH": "1",
}
"""What workers that are not children of the client need of its settings (see cluster/connect.py and emsr/start.py)."""

Workers = Annotated[StrictInt, Field(ge=1, le=100_000)]


def _walltime(value: object) -> str:
    """A walltime as Slurm writes it. It must be quoted, since YAML reads a bare 12:00:00 as the number 43200."""
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"(\d{1,3}-)?\d{1,3}:[0-5]\d:[0-5]\d", value)
        or not walltime_s(value)
    ):
        raise ValueError('a time in quotes, hours:minutes:seconds or days-hours:minutes:seconds, such as "12:00:00"')
    return value


def walltime_s(text: str) -> int:
    """Seconds of a checked walltime, `D-HH:MM:SS` or `HH:MM:SS`."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _one_line(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("one line of text")
    return value


Line = Annotated[StrictStr, AfterValidator(_one_line)]
Money = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = yaml_file.MODEL


class SecurityConfig(_Model):
    """TLS between scheduler, workers and client: each presents `cert_file` and trusts what `ca_file` has signed."""

    ca_file: Line
    cert_file: Line
    key_file: Line


class AdaptConfig(_Model):
    """The number of workers follows the amount of work, between `minimum` and `maximum`."""

    minimum: Workers = 1
    maximum: Workers

    @model_validator(mode="after")
    def _ordered(self) -> AdaptConfig:
        if self.minimum > self.maximum:
            raise ValueError("adapt.minimum not above adapt.maximum")
        return self


class _JobConfig(_Model):
    """What each job of a batch system asks for. A job runs one worker process."""

    walltime: Annotated[str, BeforeValidator(_walltime)]
    memory: Bytes
    cores: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    prologue: tuple[Line, ...] = ()
    extra_directives: tuple[Line, ...] = ()


class SlurmConfig(_JobConfig):
    """A job of Slurm."""

    partition: Line | None = None
    account: Line | None = None


class LsfConfig(_JobConfig):
    """A job of LSF."""

    queue: Line | None = None
    project: Line | None = None


class PbsConfig(_JobConfig):
    """A job of PBS Professional or OpenPBS."""

    queue: Line | None = None
    account: Line | None = None


Word = Annotated[StrictStr, Field(pattern=r"^[\w.\-]+$")]


class SgeConfig(_JobConfig):
    """A job of Grid Engine (SGE, Univa, Altair, Gridware)."""

    queue: Line | None = None
    project: Line | None = None
    parallel_environment: Word | None = None
    memory_resource: Word = "mem_free"


class KubernetesConfig(_Model):
    """What each pod asks for. A pod runs one worker process; one more runs the scheduler."""

    image: Line
    memory: Bytes
    namespace: Line | None = None
    cores: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    spot: StrictBool = False
    secret: Line | None = None
    volume_claim: Line | None = None


class ClusterConfig(_Model):
    """How workers are started or found (kind address), and how many.

    Another batch system is an entry in cluster/batch_systems.py and its keys here.
    """

    kind: Literal["local", "address", "slurm", "lsf", "pbs", "sge", "kubernetes"] = "local"
    workers: Workers | None = None
    adapt: AdaptConfig | None = None
    address: StrictStr | None = None
    host: Line | None = None
    security: SecurityConfig | None = None
    tune: StrictBool | None = None
    gpus_per_worker: Annotated[StrictInt, Field(ge=0, le=1)] | None = None
    mixed: StrictBool = False
    measured: Line | None = None
    price_per_hour: Money | None = None
    slurm: SlurmConfig | None = None
    lsf: LsfConfig | None = None
    pbs: PbsConfig | None = None
    sge: SgeConfig | None = None
    kubernetes: KubernetesConfig | None = None

    @model_validator(mode="after")
    def _address(self) -> ClusterConfig:
        if self.kind == "address":
            if not self.address or not re.fullmatch(
                r"(tcp|tls|ws|wss|ucx|ucxx)://([^\s/:\[\]]+|\[[^\s/\[\]]+\]):\d{1,5}|[\w.\-]+:\d{1,5}", self.address
            ):
                raise ValueError(
                    "cluster.address such as tcp://scheduler:8786 or tls://scheduler:8786 (kind is address)"
                )
            if self.security is not None and not self.address.startswith("tls://"):
                raise ValueError("cluster.address that begins with tls:// (cluster.security is given)")
        return self

    @model_validator(mode="after")
    def _belong(self) -> ClusterConfig:
        """Keys that the chosen kind does not read are refused, and those that it needs are required."""
        for key, kinds in _KINDS.items():
            if self.kind not in kinds and getattr(self, key) is not None:
                raise ValueError(f"no cluster.{key} when cluster.kind is {self.kind}")
        for key in (*BATCH_KINDS, "kubernetes"):
            if self.kind == key and getattr(self, key) is None:
                raise ValueError(f"the keys of cluster.{key} (kind is {key})")
        if self.kind in BATCH_KINDS and self.host is None:
            raise ValueError(
                "cluster.host, the address or network interface of this machine that jobs reach, "
                f"127.0.0.1 if all run here (kind is {self.kind})"
            )
        if self.workers is not None and self.adapt is not None:
            raise ValueError("either cluster.workers or cluster.adapt, not both")
        return self

    def tunes(self) -> bool:
        """Whether scheduler and workers get a steady clock, short logs and no profiler: where they are this run's own,
        or the file says so.
        """
        return self.kind != "address" or self.tune is True

    @property
    def jobs(self) -> SlurmConfig | LsfConfig | PbsConfig | SgeConfig | None:
        """What each job asks for; None where the kind is no batch system."""
        return {"slurm": self.slurm, "lsf": self.lsf, "pbs": self.pbs, "sge": self.sge}.get(self.kind)

    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest number of workers to start by a batch system or Kubernetes."""
        if self.adapt is not None:
            return self.adapt.minimum, self.adapt.maximum
        return self.workers or 1, self.workers or 1

    def cores(self, in_flight: int) -> int:
        """CPUs of a job or pod whose file names none: one for each slab, and one for what a GPU is told to do."""
        return in_flight + (self.gpus_per_worker or 0)

    def beside(self, folder: Path) -> ClusterConfig:
        """The same with all paths made absolute; relative ones start from `folder`, that of volume.yaml."""

        def absolute(path: str) -> str:
            return str(folder / os.path.expanduser(path))

        changed: dict[str, object] = {}
        if self.security is not None:
            paths = {key: absolute(path) for key, path in self.security.model_dump().items()}
            changed["security"] = SecurityConfig(**paths)
        if self.measured is not None:
            changed["measured"] = absolute(self.measured)
        return self.model_copy(update=changed)


BATCH_KINDS = ("slurm", "lsf", "pbs", "sge")
_STARTED = (*BATCH_KINDS, "kubernetes")
_KINDS = {
    "address": ("address",),
    "adapt": _STARTED,
    "host": BATCH_KINDS,
    "security": ("address", *BATCH_KINDS),
    "tune": ("address",),
    "gpus_per_worker": ("local", *_STARTED),
    **{kind: (kind,) for kind in _STARTED},
}
