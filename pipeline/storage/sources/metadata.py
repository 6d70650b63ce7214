"""A volume's JSON metadata objects, read with checks: a value that is missing or of the wrong kind is a SourceError."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from pipeline.base.errors import (
    DataError,
    MissingChunkError,
    NoAnswerError,
    SourceError,
    TooLargeObjectError,
    UserError,
)
from pipeline.base.limits import MAX_METADATA_BYTES
from pipeline.storage import kv
from pipeline.storage.sources import absent_answer

MAX_COORDINATE = 2**52
"""Larger numbers in metadata are refused: up to here, products with small factors fit 64 bits."""


class Metadata:
    """A JSON object. `place` says in messages where it stands: url, file and key path.

    The methods return the value of a key; each raises SourceError where it is absent or not of its kind.
    """

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self.values, self.place = values, place

    @classmethod
    def parse(cls, data: bytes, place: str) -> Metadata:
        """From JSON text. Raises SourceError where it is no JSON object."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            saw = "is empty" if not data.strip() else f"is not JSON ({error})"
            raise SourceError(
                f"{place} {saw}",
                "a JSON object",
                "It may be half written: copy it again or finish the conversion that wrote it",
            ) from None
        if not isinstance(values, dict):
            raise SourceError(f"{place} holds {_shown(values)}", "a JSON object", "Write the metadata again")
        return cls(values, place)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def wrong(self, key: str, wanted: str, do: str = "") -> SourceError:
        """The error that the caller raises where the value of `key` is not as `wanted`."""
        saw = f"{key} = {_shown(self.values[key])}" if key in self.values else f"no {key}"
        return SourceError(f"{self.place} has {saw}", wanted, do)

    def text(self, key: str, wanted: str = "text") -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.wrong(key, wanted)
        return value

    def integer(self, key: str, low: int = 0, high: int = MAX_COORDINATE) -> int:
        value = _whole(self.values.get(key))
        if value is None or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low}")
        return value

    def integers(self, key: str, count: int | None = None, low: int = 0, high: int = MAX_COORDINATE) -> list[int]:
        """A list of whole numbers from `low` to `high`, `count` of them where that is given, else at least one."""
        value = self.values.get(key)
        whole = [_whole(v) for v in value] if isinstance(value, list) else []
        found = [v for v in whole if v is not None and low <= v <= high]
        if (
            not isinstance(value, list)
            or len(found) != len(value)
            or not found
            or (count is not None and len(found) != count)
        ):
            raise self.wrong(
                key,
                f"{count or 'a list of'} whole numbers" + (f", each at least {low}" if low > -MAX_COORDINATE else ""),
            )
        return found

    def numbers(self, key: str, count: int, positive: bool = False, do: str = "") -> list[float]:
        value = self.values.get(key)
        good = (
            isinstance(value, list)
            and len(value) == count
            and all(_finite(v) and (v > 0 or not positive) for v in value)
        )
        if not isinstance(value, list) or not good:
            raise self.wrong(key, f"{count} {'positive ' if positive else ''}numbers", do)
        return [float(v) for v in value]

    def child(self, key: str) -> Metadata:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "a JSON object")
        return Metadata(value, f"{self.place} {key}")

    def children(self, key: str) -> list[Metadata]:
        """A list of at least one JSON object."""
        value = self.values.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
            raise self.wrong(key, "a list of JSON objects")
        return [Metadata(v, f"{self.place} {key}[{i}]") for i, v in enumerate(value)]


def _whole(value: object) -> int | None:
    """The value as a whole number, else None. 4.0 counts (some JavaScript writers make it of 4), True does not."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _finite(value: object) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else text[:97] + "..."


class Folder:
    """The metadata objects below one url.

    `refused` is the first answer that says neither that an object is there nor that none is (a denied permission, a
    redirect, a page), to be raised if nothing is found.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.refused: SourceError | None = None
        self._store = kv.Store(url)

    @functools.cached_property
    def _page(self) -> bytes | None:
        return absent_answer.page(self.url)

    def spec(self, path: str = "") -> dict[str, Any]:
        """tensorstore's JSON for the folder `path` below the url."""
        spec = kv.spec(self.url)
        return spec | {"path": f"{spec['path']}{path}/"} if path else spec

    def data(self, key: str, most: int = MAX_METADATA_BYTES) -> bytes | None:
        """The bytes under `key`, None where there are none. Raises SourceError where they cannot be read, or are more
        than `most`; TransientError; NoAnswerError.
        """
        try:
            found = self._store.get_at_most(key, most)
            if found is not None and self._page is not None and absent_answer.is_page(found, self._page):
                self._refuse_page(key)
                return None
            return found
        except NoAnswerError:
            raise
        except TooLargeObjectError as error:
            raise SourceError(
                error.saw, f"metadata of {error.wanted}", "Look at it: this is no volume's metadata"
            ) from None
        except UserError as error:
            # a bucket that may be read but not listed answers 403 for what is absent, a web site a redirect
            self.refused = self.refused or SourceError(error.saw, error.wanted, error.do)
            return None
        except MissingChunkError:
            return None
        except DataError as error:
            raise SourceError(str(error), "a readable metadata object", "Check source.url") from None

    def holds(self, key: str) -> bool:
        """Whether something is under `key`, of whatever size. Raises as `data` does for what passes."""
        try:
            return self.data(key) is not None
        except SourceError:
            return True

    def metadata(self, key: str) -> Metadata | None:
        """The JSON object under `key`, None where there is none.

        Raises SourceError where it is no JSON object; TransientError.
        """
        data = self.data(key)
        if data is None:
            return None
        if (self._page is not None and absent_answer.is_no_metadata(data, self._page)) or self._is_markup(data):
            self._refuse_page(key)
            return None
        return Metadata.parse(data, f"{self.url}/{quote(key)}")

    def _is_markup(self, data: bytes) -> bool:
        return self.url.startswith(("http://", "https://")) and data.lstrip()[:1] == b"<"

    def _refuse_page(self, key: str) -> None:
        self.refused = self.refused or SourceError(
            f"{self.url}/{quote(key)} is a page, as this server has (status 200) where no object is",
            "the metadata of a volume",
            "Check the url; a browser shows whether the page asks for a login",
        )


def inner_path(path: str, error: SourceError) -> str:
    """`path` without outer slashes and parts that are a dot. Raises `error` where it is empty or leads out of its
    group.
    """
    parts = [part for part in path.strip("/").split("/") if part != "."]
    if not parts or any(part in ("", "..") for part in parts):
        raise error
    return "/".join(parts)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of the metadata that defines a level's voxels."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
