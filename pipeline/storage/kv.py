"""Objects (key -> bytes) in folders, S3, GCS and HTTP through tensorstore, with its errors as errors of emsr."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import tensorstore as ts

from pipeline.base.errors import DamagedChunkError, DataError, EmsrError, MissingChunkError, TransientError, UserError
from pipeline.config.urls import split_format
from pipeline.storage import requests
from pipeline.storage.write_errors import folder_refuses

_CODE = re.compile(
    r"\b(NOT_FOUND|DATA_LOSS|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE|UNAVAILABLE|DEADLINE_EXCEEDED|"
    r"RESOURCE_EXHAUSTED|ABORTED|INTERNAL|UNKNOWN|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|UNIMPLEMENTED)\b"
)
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


# Without these, tensorstore waits for ever for a server that has accepted a request and does not answer. It reads them
# once, at the first request of the process.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

CACHE_BYTES = 64 << 20
LIST_SECONDS = 20.0
"""Time limit of a listing that only has to say whether there is any key."""
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
            # tensorstore's own default is 32 tries over a quarter of an hour, without a word on a mistyped host.
            **{
                f"{kind}_request_retries": {"max_retries": 6, "initial_delay": "500ms", "max_delay": "4s"}
                for kind in ("http", "s3", "gcs")
            },
        }
    )


def classify(error: BaseException, what: str) -> EmsrError:
    """tensorstore's error about `what` as an EmsrError, by its status code and text.

    MissingChunkError, DamagedChunkError, TransientError, or UserError for permissions, full disks and absent buckets.
    """
    if isinstance(error, EmsrError):
        return error
    text = str(error)
    found = _CODE.search(text)
    code = found.group(1) if found else ""
    if "NoSuchBucket" in text or "The specified bucket does not exist" in text:
        return UserError(
            f"{what}: there is no such bucket", "a bucket that exists", "Check the url, or create the bucket first"
        )
    if "No space left" in text or "quota exceeded" in text:
        return UserError(
            f"{what}: no space left",
            "",
            "Free some space there, then run the same command again: what is written is kept",
        )
    if code == "NOT_FOUND" or "is missing" in text:
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
    fault = folder_refuses(error, what) or classify(error, what)
    if isinstance(fault, DataError):
        return UserError(f"{what}: {_short(str(error))}", "a place that takes objects", "See its log or its owner")
    return fault


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class Store:
    """The objects below a URL. Every method raises what `classify` makes of tensorstore's errors, and nothing else."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._kv = ts.KvStore.open(spec(url), context=context()).result()
        except Exception as error:
            raise classify(error, url) from error

    def get(self, key: str) -> bytes | None:
        """The bytes under `key`, or None where there are none."""
        try:
            result = self._kv.read(key).result()
        except Exception as error:
            raise classify(error, f"{self.url}/{key}") from error
        return bytes(result.value) if result.state == "value" else None

    def put(self, key: str, value: bytes) -> None:
        """Returns when `value` is durable under `key`, whole or not at all."""
        self.put_all({key: value})

    def put_all(self, items: Mapping[str, bytes]) -> None:
        """Put several objects at the same time. All are awaited; the first failure is raised."""
        requests.WRITES.take(len(items))
        futures = {key: self._kv.write(key, value) for key, value in items.items()}
        failed: EmsrError | None = None
        for key, future in futures.items():
            try:
                future.result()
            except Exception as error:
                failed = failed or classify_write(error, f"writing {self.url}/{key}")
        if failed:
            raise failed

    def put_if(self, key: str, value: bytes, generation: bytes) -> bool:
        """Write only if the object is still of `generation` (see get_with_generation).

        Returns False, having written nothing, where another process has written it since.
        """
        try:
            stamp = self._kv.write(key, value, if_equal=generation).result()
        except Exception as error:
            raise classify_write(error, f"writing {self.url}/{key}") from error
        return bool(stamp.generation != b"")

    def get_with_generation(self, key: str) -> tuple[bytes | None, bytes]:
        """The value (None where it is absent), and its generation: the store's name of this version of it."""
        try:
            result = self._kv.read(key).result()
        except Exception as error:
            raise classify(error, f"{self.url}/{key}") from error
        value = bytes(result.value) if result.state == "value" else None
        return value, bytes(result.stamp.generation)

    def delete(self, key: str) -> None:
        """Delete the object; no error where there is none."""
        try:
            self._kv.write(key, None).result()
        except Exception as error:
            raise classify_write(error, f"deleting {self.url}/{key}") from error

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted, without the lock files that tensorstore leaves in folders."""
        stop = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        key_range = ts.KvStore.KeyRange(prefix, stop) if prefix else ts.KvStore.KeyRange()
        try:
            keys = self._kv.list(key_range).result()
        except Exception as error:
            raise classify(error, f"listing {self.url}") from error
        return sorted(k.decode() for k in keys if not k.endswith(b".__lock"))

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
            return all(key.endswith(b".__lock") for key in listing.result(timeout=LIST_SECONDS))
        except TimeoutError:
            listing.cancel()
            return False
        except Exception as error:
            raise classify(error, f"listing {self.url}") from error

    def get_all(self, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
        """(key, value) of each key in turn, None for an absent one. BATCH of them are requested at a time."""
        batch: list[str] = []
        for key in keys:
            batch.append(key)
            if len(batch) == BATCH:
                yield from self._get_batch(batch)
                batch = []
        yield from self._get_batch(batch)

    def _get_batch(self, keys: list[str]) -> Iterator[tuple[str, bytes | None]]:
        futures = [(key, self._kv.read(key)) for key in keys]
        for key, future in futures:
            try:
                result = future.result()
            except Exception as error:
                raise classify(error, f"{self.url}/{key}") from error
            yield key, bytes(result.value) if result.state == "value" else None
