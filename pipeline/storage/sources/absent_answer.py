"""What a store answers for a key that surely is not there: 404, or 403, or on the web a page. Looked for by asking.

A bucket that may be read but not listed answers 403 for what is absent. Web servers made for people answer a page with
status 200 for everything.
"""

from __future__ import annotations

import itertools
import json
import math
import uuid

from pipeline.base.errors import DataError, DeniedError, EmsrError, MovedError, SourceError
from pipeline.base.limits import MAX_METADATA_BYTES
from pipeline.base.waits import waiting
from pipeline.storage import http_body, kv
from pipeline.storage.sources.voxel_array import Level, item_bytes
from pipeline.storage.store_errors import RANGES

_START = 16
"""Bytes by which a page is known again: what follows may name the path, or the time."""


def is_denied(store: kv.Store, beside: str = "") -> bool:
    """Whether a key that is absent, in the folder of the key `beside`, is answered by 401 or 403."""
    try:
        store.get(f"{beside.rpartition('/')[0]}/emsr-absent-{uuid.uuid4().hex}".lstrip("/"))
    except DeniedError:
        return True
    return False


def page(url: str) -> bytes | None:
    """The page that a web server gives for what is absent below `url`; None for other stores and without one."""
    if not url.startswith(("http://", "https://")):
        return None
    try:
        return kv.Store(url).get_at_most(f"emsr-absent-{uuid.uuid4().hex}", MAX_METADATA_BYTES)
    except (DeniedError, MovedError, DataError):
        return None


def is_page(data: bytes, absent: bytes) -> bool:
    """Whether `data` is such a page as `absent`, perhaps with another path in it."""
    return data[:_START] == absent[:_START] or data == absent


def is_no_metadata(data: bytes, absent: bytes) -> bool:
    """Whether `data` is no JSON object, or one of the same keys as `absent`: a message as a page."""
    keys = _keys(data)
    return keys is None or keys == _keys(absent)


def _keys(data: bytes) -> set[str] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return set(value) if isinstance(value, dict) else None


def refuse_server(level: Level, fill: int | None, key: str) -> None:
    """Raises SourceError where a web server does not answer as `level` needs it: parts of shards, and 404 for holes
    that are to be filled, which `key` asks for.
    """
    if not level.url.startswith(("http://", "https://")):
        return
    with waiting(level.url):
        parts = http_body.sends_parts(f"{level.url}/{level.metadata_key}") if level.sharded else None
    if parts is False:
        raise SourceError(f"{level.place} is sharded, and its server does not answer Range requests", *RANGES)
    absent = page(level.url)
    if absent is None or (fill is None and len(absent) not in _raw_sizes(level)):
        return
    raise SourceError(
        f"the server of {level.url} answers a page (status 200) where nothing is: no absent chunk is known by that",
        "status 404 for what is absent",
        f"Let the server answer so (nginx: try_files $uri =404), or copy the volume; one without holes needs no {key}",
    )


def _raw_sizes(level: Level) -> set[int]:
    """The bytes that chunks of the level have uncompressed, those at the end of the volume too."""
    other = math.prod(level.stored_chunk) // math.prod(level.chunk) * item_bytes(level.dtype)
    ends = [{c, n % c or c, min(c, n)} for c, n in zip(level.chunk, level.bounds.shape, strict=True)]
    return {math.prod(sides) * other for sides in itertools.product(*ends)}


def explained(level: Level, damaged: EmsrError) -> str:
    """What is said of a damaged chunk of `level`: it may be a page that its server gives for an absent one."""
    try:
        absent = page(level.url)
    except EmsrError:
        absent = None
    more = "" if absent is None else " (its server answers a page where nothing is: the chunk may be absent)"
    return f"{damaged}{more}"
