"""Text that goes to a log, a report, a record or a screen, without the secrets that may have travelled in it."""

from __future__ import annotations

import re

_USER_INFO = re.compile(r"(://)[^/?#\s'\"<>]*@")
"""From here to the last @ before the path: a password may hold an @ itself."""
_QUERY = re.compile(r"(\w://[^\s'\"<>?#]*)([?#])[^\s'\"<>]*")
"""Query and fragment of a URL: signatures and tokens travel there."""
_NAMED = re.compile(
    r"(?i)\b(authorization|proxy-authorization|x-amz-[a-z-]*(?:signature|credential|security-token)|signature|"
    r"AWSAccessKeyId|aws_secret_access_key|secret_access_key|access_token|refresh_token|id_token|client_secret|"
    r"private_key|password|passwd|sig|token|api_?key)"
    r"([\"']?\s*[:=]\s*[\"']?)((?:Bearer|Basic|AWS4-HMAC-SHA256)\s+)?[^\s\"'&,;<>\]]{4,}"
)
"""A value by the name of a secret, as in headers, JSON and parts of a query."""
_ACCESS_KEY = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_ECHOED = re.compile(r"<(AWSAccessKeyId|Token-\d|SignatureProvided)>[^<]+")
"""What S3 repeats of a request that it refuses."""
HIDDEN = "..."


def redacted(text: str) -> str:
    """`text` without user names and passwords of URLs, their queries and fragments, and values of secrets."""
    text = _USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1\2{HIDDEN}", text)
    text = _NAMED.sub(rf"\1\2{HIDDEN}", text)
    text = _ECHOED.sub(rf"<\1>{HIDDEN}", text)
    return _ACCESS_KEY.sub(HIDDEN, text)
