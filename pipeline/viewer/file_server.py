"""A read-only web server for local volumes. It serves named folders to this machine only, with byte ranges and CORS."""

from __future__ import annotations

import contextlib
import re
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

from pipeline.base.errors import UserError

HOST = "127.0.0.1"

# cloud-volume stores a local precomputed chunk as `chunk.gz`; a browser asks for `chunk` and unpacks by this header.
_SUFFIXES = {"gzip": ".gz", "br": ".br", "zstd": ".zstd"}


@contextlib.contextmanager
def serving(folders: Mapping[str, Path], port: int = 0) -> Iterator[dict[str, str]]:
    """Serve each folder under its name until the block ends; yields name -> URL. Port 0 means any free port.

    CORS lets every web page that the user visits send requests to this server. The URLs hold a random word, which such
    a page cannot guess. Raises UserError where the port is taken.
    """
    secret = secrets.token_urlsafe(12)
    roots = {name: folder.resolve() for name, folder in folders.items()}
    try:
        server = _Server((HOST, port), _Handler)
    except OSError as error:
        raise UserError(
            f"port {port} on {HOST} cannot be opened ({error.strerror})",
            "a free port",
            "Give another --port, or leave it out",
        ) from None
    server.roots, server.secret = roots, secret
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="file-server", daemon=True
    )
    thread.start()
    try:
        yield {name: f"http://{HOST}:{server.server_address[1]}/{secret}/{quote(name)}" for name in roots}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range of bytes that a Range header asks for, of a file of `size` bytes; None for the whole file.

    Several ranges, other units and malformed headers count as no header (RFC 9110, 14.2).
    Raises ValueError where the range lies outside the file (status 416).
    """
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", header or "", re.IGNORECASE)
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
    if start >= stop:
        raise ValueError("outside the file")
    return start, stop


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    roots: dict[str, Path]
    secret: str

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: a browser drops connections whenever the user scrolls."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_OPTIONS(self) -> None:
        self._head(
            HTTPStatus.NO_CONTENT,
            {
                "Access-Control-Allow-Methods": "GET, HEAD, OPTIONS",
                "Access-Control-Allow-Headers": "*, Range",
                "Access-Control-Max-Age": "86400",
                "Content-Length": "0",
            },
        )

    def log_message(self, *_: object) -> None:
        """Print nothing: it would be a line per chunk."""

    def _answer(self, body: bool) -> None:
        found = self._open()
        if found is None:
            self._head(HTTPStatus.NOT_FOUND, {"Content-Length": "0"})
            return
        file, size, coding = found
        with file:
            headers = {
                "Content-Type": "application/octet-stream",
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-cache",
                "Vary": "Accept-Encoding",
            }
            if coding:
                headers["Content-Encoding"] = coding
            else:
                headers["Accept-Ranges"] = "bytes"
            try:
                part = byte_range(self.headers.get("Range"), size) if body and not coding else None
            except ValueError:
                self._head(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                    {"Content-Range": f"bytes */{size}", "Content-Length": "0"},
                )
                return
            start, stop = part or (0, size)
            headers["Content-Length"] = str(stop - start)
            if part:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._head(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK, headers)
            if body and stop > start:
                self._send(file, start, stop - start)

    def _head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header(
            "Access-Control-Expose-Headers", "Accept-Ranges, Content-Encoding, Content-Length, Content-Range"
        )
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, file: BinaryIO, start: int, count: int) -> None:
        try:
            self.wfile.flush()
            sent = self.connection.sendfile(file, start, count)
        except OSError:
            sent = -1
        if sent != count:
            # The file became shorter or the browser closed the connection: Content-Length cannot be kept any more.
            self.close_connection = True

    def _open(self) -> tuple[BinaryIO, int, str] | None:
        """The file that the request names, its size, and the Content-Encoding it is stored in ("" for none).

        None where the URL lacks the random word, leaves its folder, or names no regular file.
        """
        try:
            parts = unquote(urlsplit(self.path).path, errors="strict").split("/")
        except (UnicodeDecodeError, ValueError):
            return None
        if len(parts) < 4 or parts[0] != "" or parts[1] != self.server.secret or parts[2] not in self.server.roots:
            return None
        names = parts[3:]
        if any(name in ("", ".", "..") or "\0" in name or "\\" in name for name in names):
            return None
        root = self.server.roots[parts[2]]
        accepted = {
            coding.partition(";")[0].strip().lower() for coding in self.headers.get("Accept-Encoding", "").split(",")
        }
        for coding, suffix in [("", ""), *((c, s) for c, s in _SUFFIXES.items() if c in accepted)]:
            file = _regular(root, root.joinpath(*names[:-1], names[-1] + suffix))
            if file is not None:
                return (*file, coding)
        return None


def _regular(root: Path, path: Path) -> tuple[BinaryIO, int] | None:
    """The open file and its size.

    None where it is absent, unreadable or no regular file, or a link leads out of `root`.
    """
    try:
        path = path.resolve(strict=True)
        if not path.is_relative_to(root) or not stat.S_ISREG(path.stat().st_mode):
            return None
        return path.open("rb"), path.stat().st_size
    except OSError:
        return None
