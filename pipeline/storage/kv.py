"""Objects (key -> bytes) in folders, S3, GCS and HTTP through tensorstore, with its errors as errors of emsr."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import tensorstore as ts

from pipeline.base.errors import (
    EmsrError,
    MovedError,
    NoAnswerError,
    TooLargeObjectError,
)
from pipeline.base.secrets import redacted
from pipeline.base.waits import waiting
from pipeline.config.access import access_of, s3_endpoint
from pipeline.config.urls import bucket_and_path, local_path, split_format
from pipeline.storage import files, http_body, requests, swapped_file
from pipeline.storage.store_errors import classify as classify
from pipeline.storage.store_errors import classify_list
from pipeline.storage.store_errors import classify_write as classify_write
from pipeline.storage.volume import Encoded


def spec(url: str) -> dict[str, Any]:
    """tensorstore's JSON for the folder `url`, a normalised URL; a format prefix is left out.

    What volume.yaml or the environment says of credentials, region and who pays is in it: see `config/access`.
    s3+https://host/bucket names the endpoint; that of s3:// is AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, as for boto3.
    """
    _, url = split_format(url)
    parts = urlsplit(url)
    path = unquote(parts.path).strip("/")
    if parts.scheme == "file":
        return {"driver": "file", "path": f"/{path}/"}
    if parts.scheme in ("http", "https"):
        return {"driver": "http", "base_url": f"{parts.scheme}://{parts.netloc}", "path": f"/{path}/"}
    bucket, path = bucket_and_path(url)
    out: dict[str, Any] = {"bucket": bucket, "path": f"{path}/" if path else ""}
    access = access_of(url)
    if parts.scheme == "gs":
        payer = {"gcs_user_project": {"project_id": access.billing_project}} if access.billing_project else {}
        return {"driver": "gcs"} | out | payer
    out["driver"] = "s3"
    endpoint = s3_endpoint(url)
    if endpoint:
        out |= {"endpoint": endpoint, "aws_region": access.region or "us-east-1"}
    elif access.region:
        out |= {"aws_region": access.region}
    if access.anonymous:
        out["aws_credentials"] = {"type": "anonymous"}
    elif access.profile is not None:
        # tensorstore finds neither file by itself where a profile is named
        where = {
            "credentials_file": os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials",
            "config_file": os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config",
        }
        out["aws_credentials"] = {"type": "profile", "profile": access.profile} | {
            key: os.path.expanduser(path) for key, path in where.items()
        }
    elif os.environ.get("AWS_ACCESS_KEY_ID"):
        # Said so that tensorstore does not look for profile files and log that they are absent.
        out["aws_credentials"] = {"type": "environment"}
    return out


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

    def get_at_most(self, key: str, most: int, extra_s: float = 0.0, follow: bool = False) -> bytes | None:
        """As `get`, for `extra_s` longer. Raises TooLargeObjectError where it holds more than `most` bytes, where they
        are local or on HTTP without reading more. Redirects of a web server are a MovedError unless it is to `follow`.
        """
        path = local_path(f"{self.url}/{quote(key)}")
        value = None
        try:
            with waiting(f"{self.url}/{key}"):
                if path is not None and path.exists() and path.stat().st_size > most:
                    raise http_body.TooLong
                if self.url.startswith(("http://", "https://")):
                    value = http_body.body(f"{self.url}/{quote(key)}", most, follow)
            if value is None:
                result = self._answer(key, self._begin_read(key), extra_s)
                value = bytes(result.value) if result.state == "value" else None
            if value is not None and len(value) > most:
                raise http_body.TooLong
        except http_body.Moved as moved:
            raise _moved(self.url, key, moved) from None
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

    def put_all(self, items: Mapping[str, Encoded]) -> None:
        """Put several objects at the same time. All are awaited; the first failure is raised."""
        requests.WRITES.take(len(items))
        if self._folder is not None:
            with waiting(f"writing {self.url}"):
                files.put_all(self._folder, items)
            return
        futures = {key: self._kv.write(key, bytes(value)) for key, value in items.items()}
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
        self.delete_all([key])

    def delete_all(self, keys: Iterable[str]) -> None:
        """Delete several objects at the same time. All are awaited; the first failure is raised."""
        failed: EmsrError | None = None
        begun = [(key, self._kv.write(key, None) if self._folder is None else None) for key in keys]
        for key, future in begun:
            what = f"deleting {self.url}/{key}"
            try:
                with waiting(what), files.faults(what):
                    if future is not None:
                        future.result()
                    elif self._folder is not None:
                        (self._folder / key).unlink(missing_ok=True)
            except NoAnswerError:
                raise
            except Exception as error:
                failed = failed or classify_write(error, what)
        if failed:
            raise failed

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
            raise classify_list(error, f"listing {self.url}") from error

    def keys_between(self, start: str, stop: str) -> list[str]:
        """As `keys`: those from `start` on and before `stop`; an empty `stop` is the end."""
        try:
            with waiting(f"a list of {self.url}"):
                keys = self._kv.list(ts.KvStore.KeyRange(start, stop)).result()
        except Exception as error:
            raise classify_list(error, f"listing {self.url}") from error
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


def _moved(url: str, key: str, moved: http_body.Moved) -> MovedError:
    """The error for `key` below `url`, which a server answers by a redirect; it says what to write instead."""
    where, tail = urlsplit(moved.location), f"/{quote(key)}"
    saw = f"{url}/{quote(key)} is answered by a redirect ({moved.status}) to {redacted(moved.location) or 'itself'}"
    wanted = "a server that gives the objects itself"
    new = f"{where.scheme}://{where.netloc}{where.path}".removesuffix(tail)
    if where.scheme not in ("http", "https") or where.query or not where.path.endswith(tail) or new == url:
        return MovedError(saw, wanted, "Open it in a browser: it may ask for a login, or lie elsewhere; or copy it")
    return MovedError(saw, wanted, f"Give the url {redacted(new)}")


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
