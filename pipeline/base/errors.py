"""The errors that emsr raises on purpose. A message for users says what was found, what was wanted, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.base.secrets import redacted


class EmsrError(Exception):
    """Base of every error that emsr raises on purpose. Its text holds no password, signature or token of a URL."""

    exit_code = 1

    def __str__(self) -> str:
        return redacted(super().__str__())


class UserError(EmsrError):
    """A mistake that the user can correct: one message, exit code 2.

    The message is made of `saw` (what was found), `wanted` and `do` (advice); the last two may be empty.
    """

    exit_code = 2

    def __init__(self, saw: str, wanted: str = "", do: str = "") -> None:
        self.saw, self.wanted, self.do = saw, wanted, do
        parts = (saw, wanted and f"Wanted: {wanted}", do)
        super().__init__(". ".join(part.rstrip(".") for part in parts if part) + ".")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        return type(self), (self.saw, self.wanted, self.do)


class ConfigError(UserError):
    """One or more problems in volume.yaml, stage.yaml or table.yaml, each a line of its own."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        EmsrError.__init__(self, "\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:  # type: ignore[override]
        return type(self), (self.problems,)


class DeniedError(UserError):
    """A store refuses a request (status 401 or 403), or a disk does. Many stores answer so for what is absent."""


class MovedError(UserError):
    """A web server answers by a redirect: what was asked for lies elsewhere."""


class SourceError(UserError):
    """The source volume cannot be opened or is not what the pipeline reads."""


class TargetError(UserError):
    """The target cannot be created, or something else stands in its place."""


class LedgerError(UserError):
    """The ledger belongs to another plan, is damaged, or another run holds it."""


class NetworkError(UserError):
    """The network cannot be built, or its weights cannot be read."""


class TooLargeError(UserError):
    """A tile of the network needs more memory than its device has."""


class TooLargeObjectError(UserError):
    """A stored object has more bytes than emsr takes in."""


class ClusterError(UserError):
    """Dask workers cannot be started or reached."""


class NoAnswerError(UserError):
    """A disk, server or process does not answer, or a pipe in the place of a file might not."""


class DataError(EmsrError):
    """A permanent fault of one slab's data, such as a damaged chunk. It is not retried: the slab is quarantined."""


class MissingChunkError(DataError):
    """A chunk that the metadata promises is absent, and volume.yaml states no fill."""


class DamagedChunkError(DataError):
    """A chunk is stored but cannot be decoded, or lacks voxels."""


class TransientError(EmsrError):
    """A fault that may pass (time-out, status 429 or 5xx, lost connection): it is retried."""


class DiskError(TransientError):
    """A disk or network file system did not take a file, for the moment perhaps. It is retried."""
