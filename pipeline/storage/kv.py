"""Keys and bytes on files, S3, GCS and HTTP: the one door to tensorstore's key-value stores, and its errors told apart."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import tensorstore as ts

from pipeline.base.errors import DamagedChunkError, EmsrError, MissingChunkError, TransientError, UserError
from pipeline.config.urls import split_format
from pipeline.storage import requests

_CODE = re.compile(
    r"\b(NOT_FOUND|DATA_LOSS|INVALID_ARGUMENT|FAILED_PRECONDITION|OUT_OF_RANGE|UNAVAILABLE|DEADLINE_EXCEEDED|"
    r"RESOURCE_EXHAUSTED|ABORTED|INTERNAL|UNKNOWN|CANCELLED|PERMISSION_DENIED|UNAUTHENTICATED|UNIMPLEMENTED)\b"
)
_TRANSIENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"}


def spec(url: str) -> dict[str, Any]:
    """tensorstore's JSON for the folder `url` (normalised, without a format prefix).

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
            out["aws_credentials"] = {
                "type": "environment"
            }  # without searching, and complaining of, absent profile files
        return out
    if parts.scheme == "gs":
        return {"driver": "gcs", "bucket": parts.netloc, "path": f"{path}/" if path else ""}
    return {"driver": "http", "base_url": f"{parts.scheme}://{parts.netloc}", "path": f"/{path}/"}


# tensorstore waits for ever for a server that has accepted a request and stays silent, unless it is told how long (these are read once, at the first
# request of the process).
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

CACHE_BYTES = 64 << 20
LIST_SECONDS = 20.0


@functools.cache
def context() -> ts.Context:
    """This process's tensorstore context: bounded chunk cache and bounded concurrency (one for all volumes)."""
    cores = max(2, len(os.sched_getaffinity(0)))
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
            "data_copy_concurrency": {"limit": cores},
            "file_io_concurrency": {"limit": 32},
            "s3_request_concurrency": {"limit": 32},
            "gcs_request_concurrency": {"limit": 32},
            "http_request_concurrency": {"limit": 32},
            # tensorstore's own default is 32 tries over a quarter of an hour, in which a mistyped host shows nothing
            **{
                f"{kind}_request_retries": {"max_retries": 6, "initial_delay": "500ms", "max_delay": "4s"}
                for kind in ("http", "s3", "gcs")
            },
        }
    )


def classify(error: BaseException, what: str) -> EmsrError:
    """tensorstore's error as one of ours: missing, damaged, transient, or the user's to mend (permissions)."""
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


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


class Store:
    """A folder of keys. Every call raises MissingChunkError, DamagedChunkError, TransientError or UserError, never a bare one."""

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
        """Several puts at once; all are awaited, the first failure is raised."""
        requests.WRITES.take(len(items))
        futures = {key: self._kv.write(key, value) for key, value in items.items()}
        failed: EmsrError | None = None
        for key, future in futures.items():
            try:
                future.result()
            except Exception as error:
                failed = failed or classify(error, f"writing {self.url}/{key}")
        if failed:
            raise failed

    def put_if(self, key: str, value: bytes, generation: bytes) -> bool:
        """Write only if `key` is still at `generation` (see get_with_generation). False where somebody was faster."""
        try:
            stamp = self._kv.write(key, value, if_equal=generation).result()
        except Exception as error:
            raise classify(error, f"writing {self.url}/{key}") from error
        return bool(stamp.generation != b"")

    def get_with_generation(self, key: str) -> tuple[bytes | None, bytes]:
        """The value (None: absent) and the store's mark of this version of it."""
        try:
            result = self._kv.read(key).result()
        except Exception as error:
            raise classify(error, f"{self.url}/{key}") from error
        value = bytes(result.value) if result.state == "value" else None
        return value, bytes(result.stamp.generation)

    def delete(self, key: str) -> None:
        try:
            self._kv.write(key, None).result()
        except Exception as error:
            raise classify(error, f"deleting {self.url}/{key}") from error

    def keys(self, prefix: str = "") -> list[str]:
        """Keys under `prefix`, sorted, without the prefix's lock files."""
        stop = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        key_range = ts.KvStore.KeyRange(prefix, stop) if prefix else ts.KvStore.KeyRange()
        try:
            keys = self._kv.list(key_range).result()
        except Exception as error:
            raise classify(error, f"listing {self.url}") from error
        return sorted(k.decode() for k in keys if not k.endswith(b".__lock"))

    def is_empty(self, likely: Iterable[str] = ()) -> bool:
        """Whether there is no key at all. `likely` keys are asked for first, so that a large store answers at once.

        A listing has no "first key only": one that still runs after LIST_SECONDS, when single keys were answered, has keys to tell.
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
        """Values of many keys, requested 64 at a time."""
        batch: list[str] = []
        for key in keys:
            batch.append(key)
            if len(batch) == 64:
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
