"""A second user of this machine, for tests: who tries every port of a run and its private folders, as `nobody`.

Run as a script by root. It gives root's rights up before it tries anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import pwd
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from conftest import GUARD_S, REPOSITORY
from distributed.comm.registry import get_backend
from distributed.security import Security

from pipeline.cluster import certificates

PAGES = ("/", "/status", "/health", "/metrics", "/info/main/workers.html", "/json/counts.json", "/api/v1")
PATIENCE_S = 5


def listening(processes: Iterable[psutil.Process]) -> list[int]:
    """The ports at which these processes listen."""
    found = [c for process in processes for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return sorted({c.laddr.port for c in found})


def family() -> list[psutil.Process]:
    """This process and all that it has started."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def got_in(ports: Iterable[int], paths: Iterable[Path | str]) -> list[str]:
    """Where the second user gets in: ports that answer `nobody`, and paths that `nobody` can read."""
    asked = json.dumps([list(ports), [str(path) for path in paths]])
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run(
        [sys.executable, __file__, asked], env=environ, capture_output=True, text=True, check=False, timeout=GUARD_S
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def why_not() -> str | None:
    """The result says why no second user can be had here; it is None where one can."""
    return None if os.geteuid() == 0 else "only root can act as another user"


async def _asks_dask(port: int, scheme: str, shown: dict[str, Any]) -> bool:
    """Whether a Dask process says who it is."""
    connector = get_backend(scheme).get_connector()  # not `connect`, which tries again for as long as it may
    try:
        comm = await asyncio.wait_for(connector.connect(f"127.0.0.1:{port}", **shown), PATIENCE_S)
        try:
            await comm.write(comm.handshake_info())  # each end says this before anything else
            await asyncio.wait_for(comm.read(), PATIENCE_S)
            await comm.write({"op": "identity", "reply": True})
            return "type" in await asyncio.wait_for(comm.read(), PATIENCE_S)
        finally:
            comm.abort()
    except Exception:  # Dask and Tornado have many for a peer that speaks otherwise; each is a refusal
        return False


def _asks_without_certificate(port: int) -> bool:
    """Whether a TLS port answers somebody who shows no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError), _secured(context, port) as secured:
        return bool(secured.recv(1))  # Dask greets first; TLS 1.3 tells the refusal in its place
    return False


def _secured(context: ssl.SSLContext, port: int) -> ssl.SSLSocket:
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), PATIENCE_S))


def _reads_pages(port: int) -> bool:
    """Whether one of Dask's web pages is there."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        for page in PAGES:
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
            asked.request("GET", page)
            if asked.getresponse().status != http.HTTPStatus.NOT_FOUND:
                return True
    return False


def _opens(path: str) -> bool:
    with contextlib.suppress(OSError):
        if os.path.isdir(path):
            os.listdir(path)
        else:
            Path(path).read_bytes()
        return True
    return False


def _tries(ports: list[int], paths: list[str], strange: dict[str, Any]) -> list[str]:
    got = []
    for port in ports:
        ways = {
            "plain": asyncio.run(_asks_dask(port, "tcp", Security().get_connection_args("client"))),
            "with a certificate of another run": asyncio.run(_asks_dask(port, "tls", strange)),
            "without a certificate": _asks_without_certificate(port),
            "pages": _reads_pages(port),
        }
        got += [f"{port}: {way}" for way, answered in ways.items() if answered]
    return got + [path for path in paths if _opens(path)]


def main() -> None:
    ports, paths = json.loads(sys.argv[1])
    strange = certificates.in_memory().get_connection_args("client")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        _tries([closed.getsockname()[1]], [], strange)  # all modules are loaded while they can be read
    nobody = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
    print(json.dumps(_tries(ports, paths, strange)))


if __name__ == "__main__":
    main()
