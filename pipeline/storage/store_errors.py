"""tensorstore's errors as errors of emsr: what may pass, what is absent or damaged, and what the user mends."""

from __future__ import annotations

import errno
import re

from pipeline.base.errors import (
    DamagedChunkError,
    DataError,
    DeniedError,
    EmsrError,
    MissingChunkError,
    MovedError,
    TransientError,
    UserError,
)
from pipeline.storage.write_errors import folder_refuses

_CODE = re.compile(r"([A-Z]+(?:_[A-Z]+)*): ")
"""How a text of tensorstore's begins: with its status code, which stands nowhere else."""
_DETAIL = re.compile(r" \[(\w+)='((?:\\.|[^'\\])*)'\]\Z")
"""What may follow it, once or more: a fact by name, such as [os_error_code='28']."""
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
"""A path: whatever its own name says is no reason."""
_NO_BUCKET = re.compile(
    r'<Code>NoSuchBucket</Code>|\\?"message\\?":\s*\\?"The specified bucket does not exist|'
    r"\A(NoSuchBucket|The specified bucket does not exist)"
)
_PAYER = re.compile(r"requester pays bucket but no user project|UserProjectMissing")
_NO_CREDENTIALS = re.compile(r"Failed to create credentials provider")
_MOVED = re.compile(r"\[HTTP code (30[1-8])\]\Z")
_NO_RANGE = re.compile(r"Requested byte range .* was ignored by server\Z")
RANGES = (
    "one that does (nginx, Apache, Caddy, S3): shards are read in parts",
    "Serve it by one of these, or copy the volume; volumes without shards are read from any server",
)
"""What is wanted and advised where a server sends whole objects for parts of them."""
_DENIED = "Check the url (a store that may not be listed answers so for what is absent too) and the credentials"
_S3_CODES = {
    "ExpiredToken|TokenRefreshRequired|InvalidToken|InvalidAccessKeyId|SignatureDoesNotMatch": (
        "the store does not accept these credentials",
        "valid ones in every process",
        "Renew them, and check which profile and endpoint they are for",
    ),
    "InvalidObjectState": ("the object is archived (Glacier)", "one that can be read", "Restore the volume first"),
    "PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraintException": (
        "the bucket is in another region",
        "the bucket's",
        "State access.region, or AWS_REGION in every process",
    ),
}
"""Answers of S3 that say neither that an object is absent nor that it is damaged: what was seen, wanted, advised."""
_LIST = "the right to list there (s3:ListBucket, storage.objects.list): what lies at a target is found by it"
_WRITE = "the right to put objects there (s3:PutObject, storage.objects.create)"
_DENIED_S3 = (
    f"{_DENIED}. A public bucket: access.anonymous: true (AWS_NO_SIGN_REQUEST=YES). One whose readers pay emsr cannot "
    "ask: mount it (mount-s3 --requester-pays) or copy it (aws s3 sync --request-payer requester)"
)
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_PATH = {errno.ELOOP, errno.ENAMETOOLONG}
_TRANSIENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED", "INTERNAL", "UNKNOWN"}


def classify(error: BaseException, what: str) -> EmsrError:
    """tensorstore's error about `what` as an EmsrError, by its status code and the number of the system's error.

    MissingChunkError, DamagedChunkError, TransientError, DeniedError, MovedError, or UserError for full disks, absent
    buckets and what else a user mends.
    Paths and keys in its text decide nothing: a folder may be called "404 is missing".
    """
    if isinstance(error, EmsrError):
        return error
    text = str(error)
    code, reason, details = _parts(text)
    number = int(details.get("os_error_code", "0")) if not isinstance(error, OSError) else error.errno
    if _NO_BUCKET.search(reason) or _NO_BUCKET.search(details.get("http_response_body", "")):
        return UserError(
            f"{what}: there is no such bucket", "a bucket that exists", "Check the url, or create the bucket first"
        )
    if number in _FULL:
        return UserError(
            f"{what}: no space left",
            "",
            "Free some space there, then run the same command again: what is written is kept",
        )
    if number in _NO_PATH:
        return folder_refuses(number, what)
    if _PAYER.search(reason):
        return UserError(
            f"{what}: readers pay for this bucket",
            "the project that pays",
            "State source.access.billing_project (for a mask or target its own access), or set "
            "GOOGLE_CLOUD_QUOTA_PROJECT in every process",
        )
    if _NO_CREDENTIALS.search(reason):
        return UserError(
            f"{what}: there are no credentials to sign requests with ({_short(text)})",
            "a profile of the AWS credentials file on this machine",
            "Check access.profile and AWS_SHARED_CREDENTIALS_FILE",
        )
    said = f"{reason} {details.get('http_response_body', '')}"
    for codes, (saw, wanted, do) in _S3_CODES.items():
        if found := re.search(rf"(?:\A|\s|<Code>)({codes})\b", said):
            return UserError(f"{what}: {saw} ({found[1]})", wanted, do)
    if found := _MOVED.search(reason):
        return MovedError(
            f"{what} is answered by a redirect ({found[1]})",
            "a server that gives the objects itself",
            "Take the url that it leads to, or copy the volume",
        )
    if _NO_RANGE.search(reason):
        return UserError(f"{what}: the server does not answer Range requests", *RANGES)
    if code == "NOT_FOUND" and reason.startswith("Cannot list non-directory"):
        return folder_refuses(errno.ENOTDIR, what)
    if code == "NOT_FOUND":
        return MissingChunkError(f"{what}: {text}")
    if isinstance(error, PermissionError):
        return DeniedError(f"{what}: permission denied ({_short(text)})", "", "Check the path's rights")
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return DeniedError(
            f"{what}: permission denied ({_short(text)})", "", _DENIED if "[HTTP code " in reason else _DENIED_S3
        )
    if code in _TRANSIENT or isinstance(error, (TimeoutError, ConnectionError)):
        return TransientError(f"{what}: {text}")
    return DamagedChunkError(f"{what}: {text}")


def classify_write(error: BaseException, what: str) -> EmsrError:
    """The error of a write about `what`: DiskError or TransientError where it may pass, UserError where it will not."""
    number = error.errno if isinstance(error, OSError) else int(_parts(str(error))[2].get("os_error_code", "0"))
    fault = folder_refuses(number, what) if number else classify(error, what)
    if isinstance(fault, DeniedError) and not isinstance(error, OSError):
        return DeniedError(fault.saw, _WRITE, "Check the credentials")
    if isinstance(fault, DataError):
        return UserError(f"{what}: {_short(str(error))}", "a place that takes objects", "See its log or its owner")
    return fault


def classify_list(error: BaseException, what: str) -> EmsrError:
    """The error of a listing about `what`."""
    fault = classify(error, what)
    if isinstance(fault, DeniedError) and not isinstance(error, OSError):
        return DeniedError(fault.saw, _LIST, "Check the credentials")
    return fault


def _parts(text: str) -> tuple[str, str, dict[str, str]]:
    """tensorstore's status code ("" where it states none), its words without the paths that they quote, its details.

    `CODE: Failed to open: "/a/path": No space left [os_error_code='28']`
    """
    details: dict[str, str] = {}
    while found := _DETAIL.search(text):
        details.setdefault(found[1], found[2])
        text = text[: found.start()]
    code = _CODE.match(text)
    reason = _QUOTED.sub('""', text[code.end() :] if code else text)
    return (code[1] if code else ""), reason, details


def _short(text: str, limit: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
