"""Files of certificates that no connection could use are named before one is tried, by what is amiss with each."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

import dask
import pytest
from certificates import write_certificates
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pipeline.base.errors import ClusterError
from pipeline.cluster import certificates
from pipeline.config.cluster import SecurityConfig


def encrypt(folder: Path) -> None:
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"secret")
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret)
    )


def another_key(folder: Path) -> None:
    (folder / "key.pem").write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def written(name: str, text: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(text)

    return write


def a_folder(folder: Path) -> None:
    (folder / "cert.pem").unlink()
    (folder / "cert.pem").mkdir()


SPOILT: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: (folder / "ca.pem").unlink(), "ca.pem cannot be read (No such file or directory)"),
    (a_folder, "cert.pem cannot be read (Is a directory)"),
    (written("ca.pem", b""), "ca.pem holds no certificate"),
    (written("cert.pem", b"garbage\n"), "cert.pem holds no certificate"),
    (written("key.pem", b"\x00\xff"), "key.pem holds no private key"),
    (encrypt, "key.pem has a passphrase"),
    (another_key, "is not the key of"),
]


def named(folder: Path) -> SecurityConfig:
    return SecurityConfig(**{name: str(folder / file) for name, file in write_certificates(folder).items()})


def test_good_files_are_taken(tmp_path: Path) -> None:
    certificates.refuse_unusable(named(tmp_path))


@pytest.mark.parametrize(("spoil", "words"), SPOILT, ids=[words[:30] for _, words in SPOILT])
def test_a_bad_file_is_named(spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    files = named(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ClusterError) as refused:
        certificates.refuse_unusable(files)
    assert words in str(refused.value)
    assert "cluster.security." in str(refused.value)


def test_a_certificate_that_expired_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = named(tmp_path)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime(2100, 1, 1, tzinfo=tz)

    monkeypatch.setattr(certificates.datetime, "datetime", Later)
    with pytest.raises(ClusterError, match=r"cert\.pem expired on"):
        certificates.refuse_unusable(files)


def test_the_site_may_name_them_instead(tmp_path: Path) -> None:
    files = named(tmp_path)
    site = {
        "distributed.comm.tls.ca-file": files.ca_file,
        "distributed.comm.tls.client.cert": files.cert_file,
        "distributed.comm.tls.client.key": files.key_file,
    }
    with dask.config.set(site):
        certificates.refuse_unusable_of_site("tls://there:1")
    with (
        dask.config.set({**site, "distributed.comm.tls.client.key": files.ca_file}),
        pytest.raises(ClusterError, match=r"client\.key of Dask's configuration.*holds no private key"),
    ):
        certificates.refuse_unusable_of_site("tls://there:1")


def test_without_any_an_address_that_needs_them_is_refused() -> None:
    certificates.refuse_unusable_of_site("tcp://there:1")
    with pytest.raises(ClusterError, match=r"tls://there:1 needs certificates.*cluster\.security"):
        certificates.refuse_unusable_of_site("tls://there:1")
