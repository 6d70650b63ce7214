"""An HTTP server's answer as it is: a body up to a bound, where it redirects to, whether it sends parts of objects.

tensorstore takes whatever a server sends, without end if need be, and does not say where a redirect leads.
"""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from typing import IO
from urllib.parse import urljoin

PATIENCE_S = 10.0
BLOCK = 1 << 16
MAX_REDIRECTS = 5


class TooLong(Exception):
    """The body is longer than the bound."""


@dataclass
class Moved(Exception):
    """The answer is a redirect. `location` is where it leads in the end, an absolute URL; "" where it goes in a circle
    or says nothing.
    """

    status: int
    location: str


class _Stay(urllib.request.HTTPRedirectHandler):
    """Redirects are answers, not followed: what comes with a request goes to nobody else."""

    def redirect_request(self, *_: object) -> None:
        return None


_STAYING, _FOLLOWING = urllib.request.build_opener(_Stay), urllib.request.build_opener()


def body(url: str, most: int, follow: bool = False) -> bytes | None:
    """What `url` holds, decompressed; None where it cannot be had this way: then tensorstore is asked, which knows
    retries and errors. Raises TooLong where it has more than `most` bytes, Moved for a redirect that it may not
    `follow`.
    """
    request = urllib.request.Request(url, headers={"Accept-Encoding": "gzip"})
    try:
        with (_FOLLOWING if follow else _STAYING).open(request, timeout=PATIENCE_S) as answer:
            coding = answer.headers.get("Content-Encoding", "identity")
            if answer.status != 200 or coding not in ("identity", "gzip"):
                return None
            return _read(answer, most, zlib.decompressobj(31) if coding == "gzip" else None, answer.length)
    except urllib.error.HTTPError as error:
        if error.code in (301, 302, 303, 307, 308):
            raise Moved(error.code, _end(url, error.headers.get("Location", ""))) from None
        return None
    except (OSError, ValueError, http.client.HTTPException, zlib.error):
        return None


def sends_parts(url: str) -> bool | None:
    """Whether the server gives the first byte of what is at `url` alone when it is asked so; None where it does not
    say.
    """
    # compressed on the way, an object has no parts: a server may compress metadata, and not the shards
    request = urllib.request.Request(url, headers={"Range": "bytes=0-0", "Accept-Encoding": "identity"})
    try:
        with _STAYING.open(request, timeout=PATIENCE_S) as answer:
            part = answer.headers.get("Content-Range", "").startswith("bytes 0-0/")
            return bool(answer.status == 206 and part and len(answer.read(2)) == 1)
    except urllib.error.HTTPError as error:
        return False if error.code == 416 else None
    except (OSError, ValueError, http.client.HTTPException):
        return None


def _end(url: str, location: str) -> str:
    """Where a redirect of `url` to `location` leads in the end."""
    for _ in range(MAX_REDIRECTS):
        url = urljoin(url, location)
        if not location or not url.startswith(("http://", "https://")):
            return url if location else ""
        try:
            with _STAYING.open(url, timeout=PATIENCE_S):
                return url
        except urllib.error.HTTPError as error:
            if error.code not in (301, 302, 303, 307, 308):
                return url
            location = error.headers.get("Location", "")
        except (OSError, ValueError, http.client.HTTPException):
            return url
    return ""


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
