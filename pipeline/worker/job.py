"""The vocabulary between scheduler and workers: what a worker is given, and what it gives back. Plain values alone."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import __version__
from pipeline.base.geometry import Box
from pipeline.config.access import AccessConfig
from pipeline.config.volume import SourceConfig
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.plan.price import Footprint
from pipeline.plan.receipt import Receipt
from pipeline.plan.requests import RequestCounts, RequestRates
from pipeline.plan.target_spec import TargetSpec
from pipeline.storage.volume import VolumeInfo

WAITS = "emsr-waits"
"""The topic of Dask's events by which workers say what they wait for: run, who (HOST:PID), what, seconds."""


@dataclass(frozen=True)
class Runtime:
    """What a worker computes with: versions of the libraries that make bytes, and the kind of its device."""

    libraries: str
    device: str

    def __str__(self) -> str:
        return f"{self.libraries} on {self.device}"


@dataclass(frozen=True)
class Process:
    """A worker's process: its address in Dask, its host, its process id; "" and 0 where it could not say them."""

    address: str
    host: str
    pid: int

    @property
    def name(self) -> str:
        """HOST:PID, as receipts have it."""
        return f"{self.host}:{self.pid}"

    def __str__(self) -> str:
        return f"worker {self.address}" + (f" on {self.host}, process {self.pid}" if self.host else "")


@dataclass(frozen=True)
class Job:
    """All that a worker must know, without an open file or an array. It pickles to a few kB.

    `mask` is what the mask's metadata said when the job was made. `retries` and `stall_s` are those of volume.yaml's
    `work`, `rates` the requests of all workers together, or a worker's share of them. `emsr` is the client's version,
    which must be the worker's.
    """

    digest: str
    source: SourceConfig
    source_fingerprint: str
    network: NetworkSpec
    plan: Plan
    target: TargetSpec
    retries: int
    stall_s: float
    emsr: str = __version__
    rates: RequestRates = RequestRates()  # noqa: RUF009 - frozen
    mask: VolumeInfo | None = None
    run: str = ""
    """The run that wants it. A worker opens everything anew for another run: what was mended since is read again."""
    sources: str = ""
    """The digest of the client's installed sources, which must be the worker's; empty where any will do."""
    access: AccessConfig = AccessConfig()  # noqa: RUF009 - frozen
    """How the target's store is asked."""
    runtimes: tuple[Runtime, ...] = ()
    """What a worker may compute with; empty where anything will do."""


@dataclass(frozen=True)
class LeaseResult:
    """What a worker gives back of a lease: the receipts of its first tasks, perhaps of all, and facts of its process.

    `base_bytes` is the process's resident size when the job was open and no slab had been read, `peak_bytes` its
    largest resident size so far. `network` is what the network holds of it. `requests` counts since the process's last
    lease. `notes` are lines that the report has of how the network is computed there.
    """

    receipts: tuple[Receipt, ...]
    peak_bytes: int
    base_bytes: int
    network: Footprint = Footprint()  # noqa: RUF009 - frozen
    requests: RequestCounts = RequestCounts()  # noqa: RUF009 - frozen
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """Some voxels of the source as the client reads them: their CRC-32."""

    box: Box
    checksum: int


@dataclass(frozen=True)
class Question:
    """What a worker is asked before it gets a lease: to find the token `token` in the sidecar, and to leave `reply`."""

    token: str
    reply: str
    sample: Sample | None


@dataclass(frozen=True)
class Fitness:
    """What a worker answers that can do the job. `base_bytes` is its resident size with the job open.

    `may_freeze` says that Dask's profiler runs there under a Python that it can stop for good.
    """

    runtime: Runtime
    base_bytes: int
    may_freeze: bool = False


@dataclass(frozen=True)
class SlabCost:
    """What one slab cost on this machine, for the price of a run.

    Seconds by part, stored over raw bytes by level, resident bytes of the process before the slab, what the network
    holds of the process's memory, and the bytes of the weights where a GPU has them. `network_s` is None where the
    network was not tried.
    """

    read_s: float
    network_s: float | None
    write_s: float
    stored_share: dict[int, float]
    base_bytes: int
    network: Footprint = Footprint()  # noqa: RUF009 - frozen
    gpu_weights: int | None = None
