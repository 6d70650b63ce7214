"""What a volume.yaml comes to: a job for the workers, and what the client must know beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.volume import Config
from pipeline.prepare.specification import Choices
from pipeline.storage.kv import Store
from pipeline.storage.volume import VolumeInfo
from pipeline.worker.job import Job


@dataclass(frozen=True)
class Prepared:
    """`choices` are what `job` and `spec` were made from. `spec` is the specification that `job.digest` is the digest
    of, as plain JSON; `later` are fills that were stated after the target was begun (prepare/fills).

    `store` is the sidecar: the folder beside the target that holds plan, ledger, lock and reports.
    """

    choices: Choices
    job: Job
    spec: dict[str, Any]
    store: Store
    later: dict[str, Any]

    @property
    def config(self) -> Config:
        """The volume.yaml, with what an earlier run has chosen for its network."""
        return self.choices.config

    @property
    def source(self) -> VolumeInfo:
        """What the source's metadata say."""
        return self.choices.source
