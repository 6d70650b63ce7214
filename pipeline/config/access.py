"""How a volume's store is asked: whose credentials, who pays. Stated in volume.yaml, or in the environment for all.

Nothing here changes a byte of the target, so it is no part of the plan's digest. It holds names, never a secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic import BaseModel, StrictBool, StrictStr, model_validator

from pipeline.base.errors import UserError
from pipeline.config import urls, yaml_file

_AMAZONS = frozenset({"anonymous", "profile", "region"})
_GOOGLES = frozenset({"billing_project"})


class AccessConfig(BaseModel):
    """One store's access. What is not stated is the environment's.

    `anonymous`: requests are not signed (S3). `profile` is a section of the AWS credentials file, `region` the
    bucket's. `billing_project` is the project that pays for requests to a bucket of Google's whose readers pay. No such
    bucket of S3 can be read: tensorstore 0.1.86 sends x-amz-requester-payer, where S3 wants x-amz-request-payer.
    """

    model_config = yaml_file.MODEL

    anonymous: StrictBool = False
    profile: StrictStr | None = None
    region: StrictStr | None = None
    billing_project: StrictStr | None = None

    @model_validator(mode="after")
    def _one(self) -> AccessConfig:
        if self.anonymous and self.profile is not None:
            raise ValueError("anonymous: true or a profile: one of the two")
        return self

    def refuse_other_store(self, url: str) -> None:
        """Raises ValueError for a key that has no meaning for the store of the normalised `url`."""
        scheme = urls.split_format(url)[1].partition("://")[0]
        meant = _GOOGLES if scheme == "gs" else _AMAZONS if scheme.startswith("s3") else frozenset()
        others = [key for key in self.model_fields_set if key not in meant]
        if others:
            raise ValueError(f"access.{others[0]} is not for {scheme}:// urls")


_known: dict[str, AccessConfig] = {}


def use(url: str, access: AccessConfig) -> None:
    """From now on this process asks for what lies at the normalised `url`, below it and in its sidecar by `access`."""
    _known[urls.split_format(url)[1]] = access


def access_of(url: str, environment: Mapping[str, str] = os.environ) -> AccessConfig:
    """What was stated for `url` or the volume it lies in; what is not stated there, from the environment."""
    holding = [k for k in _known if url == k or url.startswith((f"{k}/", urls.sidecar(k)))]
    stated = _known[max(holding, key=len)] if holding else AccessConfig()
    from_environment = {
        "anonymous": environment.get("AWS_NO_SIGN_REQUEST", "").upper() in ("1", "YES", "TRUE") and not stated.profile,
        "region": environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"),
        "billing_project": environment.get("GOOGLE_CLOUD_QUOTA_PROJECT"),
    }
    return stated.model_copy(update={k: v for k, v in from_environment.items() if v and not getattr(stated, k)})


def s3_endpoint(url: str) -> str | None:
    """The endpoint of a normalised S3 URL; None where it is Amazon's. Raises UserError for one with a password."""
    scheme, _, rest = urls.split_format(url)[1].partition("://")
    if scheme.startswith("s3+"):
        return f"{scheme.removeprefix('s3+')}://{rest.partition('/')[0]}"
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if endpoint := os.environ.get(name):
            if "@" in urlsplit(endpoint).netloc:
                raise UserError(
                    f"{name} holds a user's name or password",
                    "https://host",
                    "Credentials belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                )
            return endpoint
    return None
