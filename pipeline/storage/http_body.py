"""The body of an HTTP answer up to a bound. tensorstore takes whatever a server sends, without end if need be."""

from __future__ import annotations

import http.client
import time
import urllib.request
import zlib
from typing import IO

PATIENCE_S = 10.0
BLOCK = 1 << 16


class TooLong(Exception):
    """The body is longer than the bound."""


def body(url: str, most: int) -> bytes | None:
    """What `url` holds, decompressed; None where it cannot be had this way: then tensorstore is asked, which knows
    retries and errors. Raises TooLong where it has more than `most` bytes.
    """
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            coding = answer.headers.get("Content-Encoding", "identity")
            if answer.status != 200 or coding not in ("identity", "gzip"):
                return None
            return _read(answer, most, zlib.decompressobj(31) if coding == "gzip" else None, answer.length)
    except (OSError, ValueError, http.client.HTTPException, zlib.error):
        return None


def _read(answer: IO[bytes], most: int, unzip: zlib._Decompress | None, length: int | None) -> bytes | None:
    found, end, seen = bytearray(), time.monotonic() + PATIENCE_S, 0
    while block := answer.read(BLOCK):
        seen += len(block)
        while block:
            found += unzip.decompress(block, BLOCK) if unzip else block
            block = unzip.unconsumed_tail if unzip else b""
            if len(found) > most:
                raise TooLong
        if time.monotonic() > end:
            return None
    whole = (length is None or seen == length) and (unzip is None or unzip.eof)
    return bytes(found) if whole else None
