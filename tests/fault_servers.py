"""These servers misbehave: a gateway before an emulator of S3 or GCS fails some requests and counts what is stored."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import logging
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from moto.server import ThreadedMotoServer

from pipeline.viewer.file_server import byte_range

KINDS = ("500", "503", "429", "cut", "silence")


class Gateway(ThreadingHTTPServer):
    """The gateway forwards to `upstream` (HOST, PORT). While `share` is above 0 that share of requests fails.

    What happens to each is dealt like cards, one of every kind of failure and as many blanks as belong to them, so
    that few requests meet them all. A failing request is answered 500, 503 or 429, cut off, or left in silence for
    `silence_s`; in half of the cases only after it has been carried out, as when an answer is lost. `stored` counts
    bytes by key over all uploads that were carried out, `requests` requests by fault or method, and `seen` has methods
    and paths of all requests.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, upstream: tuple[str, int], seed: int = 0, share: float = 0.0, silence_s: float = 4.0, gcs: bool = False
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.share, self.silence_s, self.gcs = upstream, share, silence_s, gcs
        self.lock = threading.Lock()
        self.uploads = threading.Lock()
        self.stored: dict[str, int] = {}
        self.requests: dict[str, int] = {}
        self.seen: list[str] = []
        self._random = random.Random(seed)
        self._dealt: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, what: str, path: str) -> None:
        with self.lock:
            self.seen.append(path)
            self.requests[what] = self.requests.get(what, 0) + 1

    def fault(self) -> tuple[str, bool]:
        """The result is the kind of this request's fault, "" for none, and whether it is carried out all the same."""
        with self.lock:
            if not self.share:
                return "", True
            if not self._dealt:
                cards = [*KINDS, *[""] * round(len(KINDS) * (1 / self.share - 1))]
                self._dealt = self._random.sample(cards, len(cards))
            kind = self._dealt.pop()
            return kind, not kind or self._random.random() < 0.5

    def bytes_under(self, prefix: str) -> int:
        return sum(size for key, size in self.stored.items() if key.startswith(prefix))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gateway

    def log_message(self, *args: object) -> None:
        pass

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, carried_out = self.server.fault()
        self.server.count(kind or self.command, f"{self.command} {self.path}")
        answer = self._forward(body) if carried_out else None
        if kind in ("500", "503", "429"):
            self._answer(int(kind), [], b"<Error><Code>InternalError</Code></Error>")
        elif kind:
            if kind == "silence":
                time.sleep(self.server.silence_s)
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif answer is not None:
            self._answer(*answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one  # noqa: N815

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self.server.gcs and self.command == "POST":
            with self.server.uploads:
                return self._gcs_upload(body)
        status, headers, answer = self._ask(self.command, self.path, body)
        key = unquote(urlsplit(self.path).path).lstrip("/")
        if self.command == "PUT" and status == 200:
            self._store(key, body)
        if self.server.gcs and status == 200:
            return self._gcs_answer(headers, answer)
        return status, headers, answer

    def _gcs_answer(self, headers: list[tuple[str, str]], answer: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The answer is an object with its generation, cut to the range asked for, or a listing cut to its bounds."""
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        if query.get("alt") == "media":
            headers = [*headers, ("x-goog-generation", self._generation(parts.path))]
            asked = byte_range(self.headers.get("Range"), len(answer))
            if asked is None:
                return 200, headers, answer
            return (
                206,
                [*headers, ("Content-Range", f"bytes {asked[0]}-{asked[1] - 1}/{len(answer)}")],
                answer[slice(*asked)],
            )
        if parts.path.endswith("/o") and self.command == "GET":
            listing = json.loads(answer)
            low, high = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
            listing["items"] = [item for item in listing.get("items", []) if low <= item["name"] < high]
            answer = json.dumps(listing).encode()
        return 200, headers, answer

    def _gcs_upload(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """The gateway checks the condition on the generation, which the emulator ignores; 0: no such object."""
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        at = f"{parts.path.removeprefix('/upload')}/{re.sub('/', '%2F', query['name'])}"
        if (wanted := query.get("ifGenerationMatch")) is not None and self._generation(at) != wanted:
            return 412, [], b""
        answer = self._ask("POST", self.path, body)
        if answer[0] == 200:
            self._store(f"{parts.path.split('/')[-2]}/{query['name']}", body)
        return answer

    def _generation(self, path: str) -> str:
        status, _, answer = self._ask("GET", path, b"", bare=True)
        return str(json.loads(answer)["generation"]) if status == 200 else "0"

    def _store(self, key: str, body: bytes) -> None:
        with self.server.lock:
            self.server.stored[key] = self.server.stored.get(key, 0) + len(body)

    def _ask(self, method: str, path: str, body: bytes, bare: bool = False) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        try:
            headers = (
                {}
                if bare
                else {
                    k: v
                    for k, v in self.headers.items()
                    if k.lower() not in ("connection", "accept-encoding", *(["range"] if self.server.gcs else []))
                }
            )
            upstream.request(method, path, body or None, headers)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value  # of a HEAD's answer: that of the object
            elif name.lower() not in ("connection", "transfer-encoding", "date", "server", "keep-alive"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Web(ThreadingHTTPServer):
    """A web server of a folder. While `share` is above 0 that share of its answers fails, each by one of `kinds`.

    `dead` cuts every request off, as where nothing answers any more; `silence` keeps it waiting for `silence_s`.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_WebHandler, directory=folder))
        self.share, self.silence_s, self.kinds = 0.0, 4.0, ("500", "503", "429", "cut", "silence", "dribble")
        self._random = random.Random(seed)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str:
        return self._random.choice(self.kinds) if self._random.random() < self.share else ""

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what this server is for."""


class _WebHandler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.server.fault()
        if kind.isdigit():
            self.send_error(int(kind))
        elif kind in ("cut", "dead", "silence"):
            if kind == "silence":
                time.sleep(self.server.silence_s)
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self._slowly = kind == "dribble"
            super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if not self._slowly:
            super().copyfile(source, outputfile)
            return
        while piece := source.read(256):
            outputfile.write(piece)
            outputfile.flush()
            time.sleep(0.02)


@contextlib.contextmanager
def web(folder: str, seed: int = 0) -> Iterator[Web]:
    """This yields a web server of the folder, and stops it at the end."""
    server = Web(folder, seed)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def s3(seed: int = 0, share: float = 0.0) -> Iterator[Gateway]:
    """This yields the gateway before moto's S3, and stops both at the end."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        with _gateway(Gateway(moto.get_host_and_port(), seed, share)) as gateway:
            yield gateway
    finally:
        moto.stop()


@contextlib.contextmanager
def gcs(bucket: str, seed: int = 0, share: float = 0.0) -> Iterator[Gateway]:
    """This yields the gateway before a GCS emulator, and stops both at the end.

    The gateway adds what the emulator leaves out of the protocol: conditional writes, generations, ranges and bounds.
    """
    from gcp_storage_emulator.server import create_server

    emulator = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    emulator.start()
    try:
        with _gateway(Gateway(emulator._api._httpd.server_address[:2], seed, share, gcs=True)) as gateway:
            yield gateway
    finally:
        emulator.stop()


@contextlib.contextmanager
def _gateway(gateway: Gateway) -> Iterator[Gateway]:
    threading.Thread(target=gateway.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield gateway
    finally:
        gateway.shutdown()
        gateway.server_close()


def s3_environment(gateway: Gateway) -> dict[str, str]:
    """The result is what clients of this gateway need in their environment."""
    return {
        "AWS_ENDPOINT_URL": gateway.url,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def gcs_environment(gateway: Gateway) -> dict[str, str]:
    return {
        "TENSORSTORE_GCS_HTTP_URL": gateway.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }
