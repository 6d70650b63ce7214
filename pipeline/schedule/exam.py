"""What makes a worker fit for a run: the client's emsr, one place for source and target, one kind of device."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.base.errors import ClusterError, EmsrError, LedgerError
from pipeline.base.geometry import ZYX, Box
from pipeline.config import urls
from pipeline.process.installed import sources_digest
from pipeline.schedule.results import CHECKS, Check, pack
from pipeline.storage import same_place
from pipeline.storage.kv import Store
from pipeline.storage.sources.open import open_source
from pipeline.worker.job import Job, Process, Question, Runtime, Sample

CREW = "crew.json"
"""What wrote this target, beside it: emsr's version and sources, libraries, device, of every kind of worker so far."""
SAMPLE = ZYX(1, 64, 64)
MAX_SAMPLE_BYTES = 64 << 20
"""The source's voxels are not compared where that would decode a larger chunk."""


class Exam:
    """The questions of one run, and what is made of the answers.

    `check` is what a worker runs. `mixed` allows different libraries and devices. `resumed` says that earlier runs have
    written something, which crew.json tells of.
    """

    def __init__(self, job: Job, check: Check, mixed: bool = False, resumed: bool = False) -> None:
        self._job = replace(job, sources=sources_digest(), runtimes=())
        self._check, self._mixed = check, mixed
        self._store = Store(urls.sidecar(job.target.url))
        self._token = f"{same_place.PREFIX}{job.run}-client"
        self._sample: Sample | None = None
        self._made: list[Path] = []
        self._accepted: tuple[Runtime, ...] | None = None
        self._holds_target = self._begun = False
        self._found = read_crew(self._store)
        self._before = self._found if resumed else []

    @property
    def job(self) -> Job:
        """The job with what a worker's process must be, for leases."""
        return replace(self._job, runtimes=() if self._mixed else self._accepted or ())

    @property
    def kinds(self) -> int:
        """How many kinds of libraries and devices write this target now."""
        return len(self._accepted or ())

    @property
    def crew(self) -> list[dict[str, str]]:
        """What crew.json holds: everything that has written this target so far, and what this run lets write."""
        here = [_entry(self._job, runtime) for runtime in self._accepted or ()]
        return self._before + [entry for entry in here if entry not in self._before]

    def begin(self) -> None:
        """Leave the client's token and take the sample of the source. Raises what storage raises."""
        self._made = same_place.absent_folders(self._store.url)
        self._store.put(self._token, self._job.run.encode())
        self._begun = True
        self._sample = _sample(self._job)

    def packed(self) -> tuple[bytes, str]:
        """What a worker is sent, and the key of the reply that it is to leave."""
        reply = f"{same_place.PREFIX}{self._job.run}-{uuid.uuid4().hex[:12]}"
        return pack(CHECKS, self._check, self._job, Question(self._token, reply, self._sample)), reply

    def packed_forget(self, reply: str) -> bytes:
        """What a worker is sent whose reply the client does not find: it deletes it."""
        return pack(CHECKS, same_place.remove_at, self._store.url, reply)

    def seen(self, replies: Collection[str]) -> set[str]:
        """Those of the replies that workers have left which the client finds; it deletes them."""
        found = same_place.found(self._store, replies, self._job.run)
        same_place.remove(self._store, found)
        return found

    def unseen(self) -> ClusterError:
        """The error of a worker whose reply the client does not find."""
        return ClusterError(
            f"what it writes to {self._store.url} is not there for the client",
            "a target that client and workers see in one place",
            "Mount the target's disk there, or take a target.url that all of them see",
        )

    def settle(self, found: Mapping[Process, Runtime]) -> dict[Process, str]:
        """Decide what this run computes with, out of what workers have (at least one); returns who has something else.

        Raises ClusterError where that cannot be decided: devices differ, or none is what wrote the target so far.
        """
        if self._mixed:
            self._accepted = tuple(dict.fromkeys(found.values()))
            return {}
        earlier = [Runtime(entry["libraries"], entry["device"]) for entry in self._before]
        known = {process: runtime for process, runtime in found.items() if not earlier or runtime in earlier}
        if not known:
            raise ClusterError(
                f"this target was begun with {' and '.join(map(str, earlier))}; {_example(found)}",
                "what wrote the rest, so that bytes do not depend on who writes them",
                "Take it again, or set cluster.mixed: true",
            )
        if len({runtime.device for runtime in known.values()}) > 1:
            raise _differ(known)
        (most, votes), *others = Counter(known.values()).most_common()
        if any(count == votes for _, count in others):
            raise _differ(known)
        self._accepted = (most,)
        return {
            process: f"it computes with {runtime}, this run with {most}"
            for process, runtime in found.items()
            if runtime != most
        }

    def refuse_late(self, runtime: Runtime) -> str:
        """Why a worker that joins a run with this is set aside; "" where it is welcome."""
        assert self._accepted is not None
        if runtime in self._accepted:
            return ""
        if self._mixed:
            self._accepted += (runtime,)
            if self._holds_target:
                self.record()
            return ""
        return f"it computes with {runtime}, this run with {' or '.join(map(str, self._accepted))}"

    def record(self) -> None:
        """Write crew.json; the caller holds the target's lock.

        Raises LedgerError where another run has written it since this one read it: what that one computed with binds
        this one too.
        """
        if not self._holds_target and read_crew(self._store) != self._found:
            raise LedgerError(
                f"another run has written {self._store.url} while this one waited for workers",
                "one run at a time",
                "Run the same command again: what is written is kept",
            )
        self._holds_target = True
        self._store.put(CREW, json.dumps(self.crew, indent=1).encode())

    @property
    def other_sources(self) -> str:
        """What emsr wrote the target so far, where none of it has this one's sources; else ""."""
        theirs = {f"{entry['emsr']} ({entry['sources'][:12]})": entry["sources"] for entry in self._before}
        return "" if not theirs or self._job.sources in theirs.values() else ", ".join(theirs)

    def end(self) -> None:
        """Delete the client's token, and where nothing was written the folders that were made for it."""
        with suppress(EmsrError):  # a store that is gone is why the run ends, and keeps the token
            same_place.remove(self._store, [self._token] if self._begun else [], self._made)


def read_crew(store: Store) -> list[dict[str, str]]:
    """What crew.json says; nothing where there is none that can be read."""
    try:
        return [
            {key: str(entry[key]) for key in ("emsr", "sources", "libraries", "device")}
            for entry in json.loads(store.get(CREW) or b"[]")
        ]
    except (ValueError, RecursionError, KeyError, TypeError):
        return []


def _entry(job: Job, runtime: Runtime) -> dict[str, str]:
    return {"emsr": job.emsr, "sources": job.sources, "libraries": runtime.libraries, "device": runtime.device}


def _sample(job: Job) -> Sample | None:
    """A piece of the section in the region's middle; None where a chunk is too large or cannot be read."""
    source = open_source(job.source)
    chunk = source.info.chunk_shape
    if chunk.z * chunk.y * chunk.x > MAX_SAMPLE_BYTES:
        return None
    middle = job.plan.region.start + job.plan.region.shape // 2
    box = Box.at(middle, SAMPLE).intersect(job.plan.region)
    checksum = same_place.voxels_checksum(source, box)
    return None if checksum is None else Sample(box, checksum)


def _differ(found: Mapping[Process, Runtime]) -> ClusterError:
    one, *_ = found.items()
    other = next(item for item in found.items() if item[1] != one[1])
    return ClusterError(
        f"{one[0]} computes with {one[1]}, {other[0]} with {other[1]}",
        "the same libraries and kind of device in every worker",
        "Leave some out, or set cluster.mixed: true",
    )


def _example(found: Mapping[Process, Runtime]) -> str:
    process, runtime = next(iter(found.items()))
    return f"{process} has {runtime}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
