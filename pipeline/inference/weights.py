"""Where a network's weights are: a file, or a URL whose sha256 the user states, kept in a cache. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline.base.errors import DiskError, EmsrError, NetworkError, NoAnswerError, TransientError, UserError
from pipeline.base.limits import MAX_WEIGHTS_BYTES
from pipeline.base.waits import waiting
from pipeline.config.urls import local_path
from pipeline.storage.files import put_all
from pipeline.storage.kv import SLOW_BYTES_PER_S, Store

SUFFIXES = (".safetensors", ".pth", ".pt")


def locate(weights: str, sha256: str | None) -> tuple[Path, str]:
    """The local file of `weights` (a normalised URL) and its sha256. Raises NetworkError.

    A remote file is fetched once into the cache folder, EMSR_CACHE or ~/.cache/emsr.
    """
    if not weights.endswith(SUFFIXES):
        raise NetworkError(
            f"network.weights {weights} has no known ending", " or ".join(SUFFIXES), "Name a weights file"
        )
    path = local_path(weights)
    if path is None:
        path = _cached(weights, sha256)
    with waiting(str(path)):
        is_file, is_folder = path.is_file(), path.is_dir()
    if not is_file:
        what = "is a folder" if is_folder else "is not there"
        do = "Write the path out: $NAME is not replaced, ~ is" if "$" in str(path) else "Check the path"
        raise NetworkError(f"network.weights {path} {what}", "a weights file that this machine sees", do)
    try:
        found = _hash(path)
    except OSError as error:
        raise NetworkError(
            f"network.weights {path} cannot be read ({error.strerror})", "a readable file", "Check its rights"
        ) from None
    if sha256 is not None and found != sha256:
        raise _other_file(path, found, sha256)
    return path, found


def _cached(url: str, sha256: str | None) -> Path:
    if sha256 is None:
        raise NetworkError(
            f"network.weights is a URL ({url}) without network.sha256",
            "the sha256 of the file",
            "State it, so that every worker runs the same weights",
        )
    folder = _cache_folder()
    path = folder / f"{sha256}{Path(url).suffix}"
    try:
        with waiting(str(path)):
            is_file = path.is_file()
        if is_file and _hash(path) == sha256:
            return path
    except OSError as error:
        raise NetworkError(f"{path} cannot be read ({error.strerror})", "a readable file", "Remove it") from None
    value = _fetch(url, sha256)
    try:
        with waiting(str(folder), len(value) / SLOW_BYTES_PER_S):
            put_all(folder, {path.name: value})
    except (UserError, DiskError) as error:
        why = getattr(error, "saw", str(error))
        raise NetworkError(f"fetched weights cannot be kept: {why}", "", "EMSR_CACHE can name another folder") from None
    return path


def _cache_folder() -> Path:
    named = os.environ.get("EMSR_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "emsr"
    except RuntimeError:
        raise NetworkError(
            "this user has no home folder, where fetched weights are kept", "", "EMSR_CACHE can name another folder"
        ) from None


def _fetch(url: str, sha256: str) -> bytes:
    parent, _, name = url.rpartition("/")
    try:
        # the sha256 says what they are, wherever a redirect leads
        value = Store(parent).get_at_most(name, MAX_WEIGHTS_BYTES, MAX_WEIGHTS_BYTES / SLOW_BYTES_PER_S, follow=True)
    except NoAnswerError:
        raise
    except TransientError as error:
        raise TransientError(f"network.weights {url} cannot be fetched: {error}") from None
    except EmsrError as error:
        raise NetworkError(
            f"network.weights {url} cannot be fetched: {error}", "", "Check the url and the network"
        ) from None
    if value is None:
        raise NetworkError(f"network.weights {url} is not there", "a weights file", "Check the url")
    if (found := hashlib.sha256(value).hexdigest()) != sha256:
        raise _other_file(url, found, sha256)
    return value


def _other_file(where: object, found: str, wanted: str) -> NetworkError:
    return NetworkError(
        f"network.weights {where} has sha256 {found}",
        wanted,
        "Take the file that network.sha256 means, or correct it",
    )


def _hash(path: Path) -> str:
    with waiting(str(path), path.stat().st_size / SLOW_BYTES_PER_S), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
