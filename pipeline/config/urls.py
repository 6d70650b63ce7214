"""URLs as users write them, made absolute: plain paths, file, s3, gs, http(s), each with an optional format prefix.

`s3+https://host/bucket/path` (or s3+http) names an S3 endpoint other than the environment's, as in Neuroglancer.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pipeline.base.errors import UserError
from pipeline.base.secrets import redacted

SCHEMES = ("file", "s3", "s3+https", "s3+http", "gs", "http", "https")
FORMATS = ("zarr", "zarr2", "zarr3", "n5", "precomputed")
_PIPED = {name: name for name in FORMATS[:-1]} | {"neuroglancer-precomputed": "precomputed"}
"""Formats as Neuroglancer writes them after a url, and as they are written before one."""
MAX_NAME_BYTES = 255
"""Of one name in a path, on every file system of Linux."""


def split_format(url: str) -> tuple[str | None, str]:
    """`precomputed://gs://b/p` -> ("precomputed", "gs://b/p"); a URL without a format prefix -> (None, url)."""
    head, sep, rest = url.partition("://")
    if sep and head in FORMATS:
        return head, rest
    return None, url


def normalise(url: str, base: Path) -> str:
    """The URL in one spelling: a scheme of SCHEMES, no trailing slash, any format prefix kept.

    A plain path becomes file://; a relative one starts from the folder `base`; `s3://https://host/bucket`, as
    cloud-volume has it, becomes s3+https://host/bucket. Raises UserError for an unknown scheme, an empty path, a
    missing bucket or host, a query, a user's name or password, or control characters. No message quotes those.
    """
    for what, text in (("url", url), ("the folder", str(base))):
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python holds a byte that is no UTF-8
            raise UserError(f"{what} {text!r} has a name that is not UTF-8", "UTF-8, as in Zarr's keys", "Rename it")
    if not url.isprintable():
        raise UserError(f"url {redacted(url)!r} holds control characters", "printable ones", "Remove them")
    place, bar, piped = url.rpartition("|")
    if bar and piped.rstrip(":") in _PIPED:
        raise UserError(
            f"url {redacted(url)!r} ends in |{piped}, as in Neuroglancer",
            "the format before the url",
            f"Write {_PIPED[piped.rstrip(':')]}://{redacted(place.rstrip('/'))}",
        )
    kind, rest = split_format(url)
    prefix = f"{kind}://" if kind else ""
    if rest.startswith(("s3://https://", "s3://http://")):
        rest = "s3+" + rest.removeprefix("s3://")
    scheme, sep, _ = rest.partition("://")
    if not sep:
        if not rest.strip():
            raise UserError(f"url {url!r} has no path", "a path or file://, s3://, gs://, https:// URL")
        return prefix + "file://" + quote(os.path.normpath(base / _expanded(rest)))
    if scheme not in SCHEMES:
        known = ", ".join(f"{s}://" for s in SCHEMES + FORMATS)
        raise UserError(f"url {redacted(url)!r} starts with {scheme}://", f"a plain path or one of {known}")
    parts = urlsplit(rest)
    if "@" in parts.netloc:
        raise UserError(
            f"url {redacted(url)} holds a user's name or password",
            "a URL without one",
            "It would stand in reports beside the target. Give credentials by the environment, or serve the volume "
            "where none are asked for",
        )
    if scheme == "file" and (parts.netloc not in ("", "localhost") or not parts.path.strip("/")):
        raise UserError(f"url {redacted(url)!r} names no absolute path", "file:///folder/volume")
    if scheme != "file" and not parts.netloc:
        raise UserError(f"url {redacted(url)!r} names no bucket or host", f"{scheme}://bucket-or-host/path")
    if scheme.startswith("s3+") and not parts.path.strip("/"):
        raise UserError(f"url {redacted(url)!r} names no bucket", f"{scheme}://host/bucket/path")
    if parts.query or parts.fragment:
        raise UserError(
            f"url {redacted(url)} holds a {'query' if parts.query else 'fragment (#)'}",
            "a URL without one",
            "Give credentials by the environment, not in the URL",
        )
    if scheme == "file":
        return prefix + "file://" + quote(os.path.normpath(_expanded(unquote(parts.path))))
    return prefix + rest.rstrip("/")


def _expanded(path: str) -> Path:
    try:
        return expanded(path)
    except ValueError as error:
        raise UserError(f"url {path[:80]!r}", str(error)) from None


def expanded(path: str) -> Path:
    """A path of this machine with `~` replaced. Raises ValueError, which says what is wanted, where none can be so."""
    if any(len(os.fsencode(name)) > MAX_NAME_BYTES for name in path.split("/")):
        raise ValueError(f"a path whose names have at most {MAX_NAME_BYTES} bytes")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError("a path written out, as this machine knows no home for its ~") from None


def bucket_and_path(url: str) -> tuple[str, str]:
    """Bucket and path of a normalised s3, s3+https, s3+http or gs URL, without outer slashes; both unquoted."""
    parts = urlsplit(split_format(url)[1])
    path = unquote(parts.path).strip("/")
    if not parts.scheme.startswith("s3+"):
        return parts.netloc, path
    bucket, _, rest = path.partition("/")
    return bucket, rest


def local_path(url: str) -> Path | None:
    """The path of a file:// URL (a format prefix is allowed), None for other schemes."""
    _, rest = split_format(url)
    return Path(unquote(urlsplit(rest).path)) if rest.startswith("file://") else None


def sidecar(target_url: str) -> str:
    """The URL of the sidecar, the folder beside the target that holds plan, ledger, lock and reports.

    It is the target's URL without format prefix, and `.emsr`.
    """
    return split_format(target_url)[1] + ".emsr"


def volume_name(url: str) -> str:
    """The last part of a volume's URL as people read it: without percent signs, `.zarr` and `.ome.zarr`."""
    last = unquote(url.rstrip("/").rpartition("/")[2])
    return last.removesuffix(".zarr").removesuffix(".ome") or last
