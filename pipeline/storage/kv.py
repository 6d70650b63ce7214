"""Objects (key -> bytes) in folders, S3, GCS and HTTP through tensorstore, with its errors as errors of emsr."""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import tensorstore as ts

from pipeline.base.errors import (
    DamagedChunkError,
    DataError,
    EmsrError,
    MissingChunkError,
    NoAnswerError,
    TooLargeObjectError,
    TransientError,
    UserError,
)
from pipeline.base.waits import waiting
from pipeline.config.urls import local_path, split_format
from pipeline.storage import files, http_body, requests, swapped_file
from pipeline.storage.write_errors import folder_refuses

_CODE = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
"""How a text of tensorstore's begins: with its status code, which stands nowhere else."""
_DETAIL = re.compile(r" \[(\w+)='((?:\\.|[^'\\])*)'\]\Z")
"""What may follow it, once or more: a fact by name, such as [os_error_code='28']."""
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
"""A path: whatever its own name says is no reason."""
_NO_BUCKET = re.compile(
    r'<Code>NoSuchBucket</Code>|\\?"message\\?":\s*\\?"The specified bucket does not exist|'
    r"\A(NoSuchBucket|The specified bucket does not exist)"
)
_FULL = {errno.ENOSPC, errno.EDQUOT}
_TRANSIENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"}


def spec(url: str) -> dict[str, Any]:
    """tensorstore's JSON for the folder `url`, a normalised URL; a format prefix is left out.

    S3 endpoints other than AWS come from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, the region from AWS_REGION or
    AWS_DEFAULT_REGION: the variables that boto3 reads; credentials from the standard places.
    """
    _, url = split_format(url)
    parts = urlsplit(url)
    path = unquote(parts.path).strip("/")
    if parts.scheme == "file":
        return {"driver": "file", "path": f"/{path}/"}
    if parts.scheme == "s3":
        out: dict[str, Any] = {"driver": "s3", "bucket": parts.netloc, "path": f"{path}/" if path else ""}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint:
            out |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        elif region:
            out |= {"aws_region": region}
        if os.environ.get("AWS_ACCESS_KEY_ID"):
            # Said so that tensorstore does not look for profile files and log that they are absent.
            out["aws_credentials"] = {"type": "environment"}
        return out
    if parts.scheme == "gs":
        return {"driver": "gcs", "bucket": parts.netloc, "path": f"{path}/" if path else ""}
    return {"driver": "http", "base_url": f"{parts.scheme}://{parts.netloc}", "path": f"/{path}/"}


# Without these, tensorstore waits for ever for a server that has accepted a request and does not answer, or that sends
# a byte now and then. It reads them once, at the first request of the process.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "100")

CACHE_BYTES = 64 << 20
LIST_SECONDS = 20.0
"""Time limit of a listing that only has to say whether there is any key."""
SLOW_BYTES_PER_S = 1e6
"""Voxels may come this slowly: so much longer than other answers a large box is waited for."""
BATCH = 64
"""Keys requested at a time by Store.get_all."""


@functools.cache
def context() -> ts.Context:
    """The tensorstore context of this process, shared by all volumes: a bounded chunk cache, bounded concurrency."""
    cores = max(2, len(os.sched_getaffinity(0)))
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
            "data_copy_concurrency": {"limit": cores},
            "file_io_concurrency": {"limit": 32},
            "s3_request_concurrency": {"limit": 32},
            "gcs_request_concurrency": {"limit": 32},
            "http_request_concurrency": {"limit": 32},
            # With its locks, tensorstore writes into a lock file that a killed process has left, and does not cut off
            # what was in it. Targets are written by `files`; what is written through arrays has one writer.
            "file_io_locking": {"mode": "none"},
            # tensorstore's own default is 32 tries over a quarter of an hour, without a word on a mistyped host.
            **{
                f"{kind}_request_retries": {"max_retries": 6, "initial_delay": "500ms", "max_delay": "4s"}
                for kind in ("http", "s3", "gcs")
            },
        }
    )


def classify(error: BaseException, what: str) -> EmsrError:
    """tensorstore's error about `what` as an EmsrError, by its status code and the number of the system's error.

    MissingChunkError, DamagedChunkError, TransientError, or UserError for permissions, full disks and absent buckets.
    Paths and keys in its text decide nothing: a folder may be called "404 is missing".
    """
    if isinstance(error, EmsrError):
        return error
    text = str(error)
    code, reason, details = _parts(text)
    number = int(details.get("os_error_code", "0")) if not isinstance(error, OSError) else error.errno
    if _NO_BUCKET.search(reason) or _NO_BUCKET.search(details.get("http_response_body", "")):
        return UserError(
            f"{what}: there is no such bucket", "a bucket that exists", "Check the url, or create the bucket first"
        )
    if number in _FULL:
        return UserError(
            f"{what}: no space left",
            "",
            "Free some space there, then run the same command again: what is written is kept",
        )
    if code == "NOT_FOUND" and reason.startswith("Cannot list non-directory"):
        return folder_refuses(errno.ENOTDIR, what)
    if code == "NOT_FOUND":
        return MissingChunkError(f"{what}: {text}")
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or isinstance(error, PermissionError):
        return UserError(
            f"{what}: permission denied ({_short(text)})",
            "",
            "Check the path's rights or the credentials in the environment",
        )
    if code in _TRANSIENT or isinstance(error, (TimeoutError, ConnectionError)):
        return TransientError(f"{what}: {text}")
    return DamagedChunkError(f"{what}: {text}")


def classify_write(error: BaseException, what: str) -> EmsrError:
    """The error of a write about `what`: DiskError or TransientError where it may pass, UserError where it will not."""
    number = error.errno if isinstance(error, OSError) else int(_parts(str(error))[2].get("os_error_code", "0"))
    fault = folder_refuses(number, what) if number else classify(error, what)
    if isinstance(fault, DataError):
        return UserError(f"{what}: {_short(str(error))}", "a place that takes objects", "See its log or its owner")
    return fault


def _parts(text: str) -> tuple[str, str, dict[str, str]]:
    """tensorstore's status code ("" where it states none), its words without the paths that they quote, its details.

    `CODE: Failed to open: "/a/path": No space left [os_error_code='28']`
    """
    details: dict[str, str] = {}
    while found := _DETAIL.search(text):
        details.setdefault(found[1], found[2])
        text = text[: found.start()]
    code = _CODE.match(text)
    reason = _QUOTED.sub('""', text[code.end() :] if code else text)
    return (code[1] if code else ""), reason, details


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class Store:
    """The objects below a URL. Every method raises what `classify`, `classify_write` or `folder_refuses` make of an
    error, and nothing else.

    In folders tensorstore only reads; `files` and `swapped_file` write.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = local_path(url)
        try:
            self._kv = ts.KvStore.open(spec(url), context=context()).result()
        except Exception as error:
            raise classify(error, url) from error

    def get(self, key: str) -> bytes | None:
        """The bytes under `key`, or None where there are none."""
        result = self._answer(key, self._begin_read(key))
        return bytes(result.value) if result.state == "value" else None

    def get_at_most(self, key: str, most: int, extra_s: float = 0.0) -> bytes | None:
        """As `get`, for `extra_s` longer. Raises TooLargeObjectError where it holds more than `most` bytes, where they
        are local or on HTTP without reading more.
        """
        path = local_path(f"{self.url}/{quote(key)}")
        value = None
        try:
            with waiting(f"{self.url}/{key}"):
                if path is not None and path.exists() and path.stat().st_size > most:
                    raise http_body.TooLong
                if self.url.startswith(("http://", "https://")):
                    value = http_body.body(f"{self.url}/{quote(key)}", most)
            if value is None:
                result = self._answer(key, self._begin_read(key), extra_s)
                value = bytes(result.value) if result.state == "value" else None
            if value is not None and len(value) > most:
                raise http_body.TooLong
        except http_body.TooLong:
            raise TooLargeObjectError(
                f"{self.url}/{quote(key)} holds more than {most >> 20} MiB", f"at most {most >> 20} MiB", "Look at it"
            ) from None
        except OSError as error:
            raise classify(error, f"{self.url}/{key}") from error
        return value

    def put(self, key: str, value: bytes) -> None:
        """Returns when `value` is durable under `key`, whole or not at all."""
        self.put_all({key: value})

    def put_all(self, items: Mapping[str, bytes]) -> None:
        """Put several objects at the same time. All are awaited; the first failure is raised."""
        requests.WRITES.take(len(items))
        if self._folder is not None:
            with waiting(f"writing {self.url}"):
                files.put_all(self._folder, items)
            return
        futures = {key: self._kv.write(key, value) for key, value in items.items()}
        failed: EmsrError | None = None
        for key, future in futures.items():
            try:
                with waiting(f"writing {self.url}/{key}"):
                    future.result()
            except NoAnswerError:
                raise
            except Exception as error:
                failed = failed or classify_write(error, f"writing {self.url}/{key}")
        if failed:
            raise failed

    def put_if(self, key: str, value: bytes, generation: bytes) -> bytes | None:
        """Write only if the object is still of `generation` (see get_with_generation); returns its new generation.

        Returns None, having written nothing, where another process has written it since. After an error it may be
        written or not. `value` is a JSON object: in folders it gets members of `swapped_file`.
        """
        what = f"writing {self.url}/{key}"
        if self._folder is not None:
            with waiting(what), files.faults(what):
                return swapped_file.swap(self._folder / key, value, generation)
        try:
            with waiting(f"writing {self.url}/{key}"):
                stamp = self._kv.write(key, value, if_equal=generation).result()
        except Exception as error:
            raise classify_write(error, what) from error
        return bytes(stamp.generation) or None

    def get_with_generation(self, key: str) -> tuple[bytes | None, bytes]:
        """The value (None where it is absent), and its generation: the store's name of this version of it.

        In folders a file is written beside it for a moment: see `swapped_file.look`.
        """
        if self._folder is not None:
            refuse_special(self._folder / key)
            with waiting(f"{self.url}/{key}"), files.faults(f"{self.url}/{key}"):
                return swapped_file.look(self._folder / key)
        result = self._answer(key, self._begin_read(key))
        value = bytes(result.value) if result.state == "value" else None
        return value, bytes(result.stamp.generation)

    def delete(self, key: str) -> None:
        """Delete the object; no error where there is none."""
        what = f"deleting {self.url}/{key}"
        if self._folder is not None:
            with waiting(what), files.faults(what):
                (self._folder / key).unlink(missing_ok=True)
            return
        try:
            with waiting(f"deleting {self.url}/{key}"):
                self._kv.write(key, None).result()
        except Exception as error:
            raise classify_write(error, what) from error

    def sweep(self) -> None:
        """Remove what killed processes have left half written. Only folders have such things."""
        if self._folder is not None:
            files.sweep(self._folder)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted, without the files in folders that are no objects."""
        stop = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        return self.keys_between(prefix, stop)

    def is_empty(self, likely: Iterable[str] = ()) -> bool:
        """Whether there is no key at all. `likely` keys are read first, so that the answer of a large store is quick.

        tensorstore cannot list the first key alone. A listing that takes more than LIST_SECONDS is taken for one with
        keys.
        """
        for _, value in self.get_all(likely):
            if value is not None:
                return False
        listing = self._kv.list()
        try:
            with waiting(f"a list of {self.url}"):
                keys = listing.result(timeout=LIST_SECONDS)
            return all(files.is_own(key.decode(errors="backslashreplace")) for key in keys)
        except TimeoutError:
            listing.cancel()
            return False
        except Exception as error:
            raise classify(error, f"listing {self.url}") from error

    def keys_between(self, start: str, stop: str) -> list[str]:
        """As `keys`: those from `start` on and before `stop`; an empty `stop` is the end."""
        try:
            with waiting(f"a list of {self.url}"):
                keys = self._kv.list(ts.KvStore.KeyRange(start, stop)).result()
        except Exception as error:
            raise classify(error, f"listing {self.url}") from error
        return sorted(name for key in keys if not files.is_own(name := key.decode(errors="backslashreplace")))

    def get_all(self, keys: Iterable[str], at_once: int = BATCH) -> Iterator[tuple[str, bytes | None]]:
        """(key, value) of each key in turn, None for an absent one. So many of them are requested at a time."""
        batch: list[str] = []
        for key in keys:
            batch.append(key)
            if len(batch) == at_once:
                yield from self._get_batch(batch)
                batch = []
        yield from self._get_batch(batch)

    def _get_batch(self, keys: list[str]) -> Iterator[tuple[str, bytes | None]]:
        for key, future in [(key, self._begin_read(key)) for key in keys]:
            result = self._answer(key, future)
            yield key, bytes(result.value) if result.state == "value" else None

    def _begin_read(self, key: str) -> ts.Future[ts.KvStore.ReadResult]:
        """A read of `key`. Raises NoAnswerError where no file lies there."""
        if self._folder is not None:
            refuse_special(self._folder / key)
        return self._kv.read(key)

    def _answer(
        self, key: str, future: ts.Future[ts.KvStore.ReadResult], extra_s: float = 0.0
    ) -> ts.KvStore.ReadResult:
        try:
            with waiting(f"{self.url}/{key}", extra_s):
                return future.result()
        except Exception as error:
            raise classify(error, f"{self.url}/{key}") from error


def waiting_for_voxels(what: str, size: int) -> AbstractContextManager[None]:
    """This thread waits for so many bytes of voxels inside the block."""
    return waiting(what, size / SLOW_BYTES_PER_S)


def refuse_special(path: Path) -> None:
    """Raises NoAnswerError where a pipe, socket or device is at this path: it may never give what a file would."""
    with waiting(str(path)):
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError):
            return  # absent, or a matter of the reader's
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    if (kind := kinds.get(stat.S_IFMT(mode))) is not None:
        raise NoAnswerError(f"{path} is {kind}", "a file", "Check the path")
