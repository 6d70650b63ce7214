"""A small web server that answers as others do who were met: pages for absent keys, redirects, no parts of objects."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGE = b"<!doctype html><title>Atlas</title>There is nothing at this address."


class OddServer(ThreadingHTTPServer):
    """Files below `root`. Every attribute is one oddity; without any it answers as it should."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.absent: tuple[int, bytes] = (404, b"")
        """What is answered where no file is."""
        self.denied: Callable[[str], bool] = lambda path: False
        """Paths that are answered by 403 though a file is there."""
        self.refusal: tuple[str, tuple[int, bytes]] = ("", (404, b""))
        """One path, and what is answered there."""
        self.moved: Callable[[str], str | None] = lambda path: None
        """Where a path is redirected to."""
        self.ranges = "yes"
        """`no`: the whole object, 200. `whole`: the whole object, 206. `never`: 416."""
        self.compress = self.chunked = False
        self.version = "HTTP/1.1"
        self.seen: list[dict[str, str]] = []
        """The headers of every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: OddServer

    def log_message(self, *args: object) -> None:
        pass

    def setup(self) -> None:
        self.protocol_version = self.server.version
        super().setup()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.seen.append(dict(self.headers) | {"path": self.path})
        if (location := server.moved(path)) is not None:
            return self._answer(302, b"", Location=location)
        file = server.root / path.lstrip("/")
        if path == server.refusal[0]:
            return self._answer(*server.refusal[1])
        if server.denied(path):
            return self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        if not file.is_file():
            return self._answer(*server.absent)
        body, span = file.read_bytes(), self.headers.get("Range")
        if not span or server.ranges == "no":
            if server.compress and "gzip" in self.headers.get("Accept-Encoding", ""):
                return self._answer(200, gzip.compress(body), Content_Encoding="gzip")
            return self._answer(200, body)
        if server.ranges == "never":
            return self._answer(416, b"")
        first, last = span.removeprefix("bytes=").split("-")
        start = int(first) if first else max(0, len(body) - int(last))
        stop = min(int(last) + 1 if first and last else len(body), len(body))
        if server.ranges == "whole":
            start, stop = 0, len(body)
        self._answer(206, body[start:stop], Content_Range=f"bytes {start}-{stop - 1}/{len(body)}")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("ETag", '"1"')
        self.send_header("x-goog-generation", "1")
        chunked = self.server.chunked and status == 200
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.server.version == "HTTP/1.1" and not chunked:
            self.send_header("Content-Length", str(len(body)))
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def serving(root: Path) -> Iterator[OddServer]:
    server = OddServer(root)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
