"""What a volume.yaml comes to: a job for the workers, and what the client must know beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.volume import Config
from pipeline.storage.kv import Store
from pipeline.storage.volume import VolumeInfo
from pipeline.worker.job import Job


@dataclass(frozen=True)
class Prepared:
    """`source` is what its metadata say. `spec` is the specification that `job.digest` is the digest of, as plain JSON.

    `store` is the sidecar: the folder beside the target that holds plan, ledger, lock and reports.
    """

    config: Config
    job: Job
    source: VolumeInfo
    spec: dict[str, Any]
    store: Store
