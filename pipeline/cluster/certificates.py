"""Certificates of one run: whoever has none of them is refused by scheduler, workers and nannies.

They keep out the other users of this machine, and of the network that Slurm's jobs are in. A key dies with its run.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import NameOID
from distributed import Security

from pipeline.base.errors import ClusterError
from pipeline.config.cluster import SecurityConfig

# No clock of any host decides whether they are valid (RFC 5280, 4.1.2.5: the last is "no expiration date").
_FROM = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)


def made() -> tuple[str, str]:
    """A new certificate and its private key, both PEM. It has signed itself, and is the one authority of its cluster.

    As `Security.temporary` does it, but with an elliptic curve, whose keys and handshakes cost less than RSA's.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "emsr")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), private.decode()


def in_memory() -> Security:
    """TLS for processes that this one starts. Dask hands it to them through pipes.

    Only for the moment in which OpenSSL loads it, it stands in a file, in a folder that no other user can enter.
    """
    certificate, key = made()
    return security(certificate, certificate, key)


@contextmanager
def in_files(folder: Path) -> Iterator[SecurityConfig]:
    """The paths of a certificate and its key, in a new folder below `folder` that no other user can enter.

    Both are deleted at the end. Raises ClusterError where `folder` takes no files.
    """
    try:
        private = tempfile.TemporaryDirectory(prefix=".emsr-tls-", dir=folder)  # of mode 0700
    except OSError as error:
        raise ClusterError(
            f"the certificates of this run cannot be written into {folder} ({error.strerror})",
            "a folder that jobs see too",
            "Start the run in such a folder, or give cluster.security",
        ) from None
    with private as name:
        certificate, key = (Path(name) / file for file in ("cert.pem", "key.pem"))
        for path, text in zip((certificate, key), made(), strict=True):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
                file.write(text)
        yield SecurityConfig(ca_file=str(certificate), cert_file=str(certificate), key_file=str(key))


def refuse_unusable(files: SecurityConfig) -> None:
    """Raises ClusterError where the files of volume.yaml cannot be read, or hold no certificate with its key."""
    _refuse_unusable({f"cluster.security.{name}": path for name, path in files.model_dump().items()})


def refuse_unusable_of_site(address: str) -> None:
    """The same for the files that Dask's own configuration names, and where it names none for a tls:// address."""
    if not address.startswith(("tls://", "wss://")):
        return
    site = Security()
    files = {
        "distributed.comm.tls.ca-file": site.tls_ca_file,
        "distributed.comm.tls.client.cert": site.tls_client_cert,
        "distributed.comm.tls.client.key": site.tls_client_key or site.tls_client_cert,
    }
    for name, path in files.items():
        if not path:
            raise ClusterError(
                f"cluster.address {address} needs certificates, and there is no cluster.security "
                f"and no {name} in Dask's configuration",
                "the files that the scheduler trusts",
                "Give cluster.security with ca_file, cert_file and key_file",
            )
    if not any("\n" in path for path in files.values()):  # else it is PEM, not a path
        _refuse_unusable({f"{name} of Dask's configuration,": path for name, path in files.items()})


def _refuse_unusable(files: Mapping[str, str]) -> None:
    """`files` are names and paths of the authorities' certificates, of the own certificate, and of its key."""
    found = {}
    for name, path in files.items():
        try:
            found[name] = Path(path).read_bytes()
        except OSError as error:
            raise ClusterError(
                f"{name} {path} cannot be read ({error.strerror})", "a PEM file", "See docs/clusters.md"
            ) from None
    authorities, own, secret = files
    certificate = [_certificates(f"{name} {files[name]}", found[name]) for name in (authorities, own)][1][0]
    key = _private_key(f"{secret} {files[secret]}", found[secret])
    if certificate.public_key() != key.public_key():
        raise ClusterError(
            f"{secret} {files[secret]} is not the key of {own} {files[own]}", "the two that were made together"
        )
    if (end := certificate.not_valid_after_utc) < datetime.datetime.now(datetime.UTC):
        raise ClusterError(
            f"{own} {files[own]} expired on {end:%Y-%m-%d}", "a certificate that is valid", "Have it renewed"
        )


def _certificates(what: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ClusterError(f"{what} holds no certificate", "a PEM file with one", "See docs/clusters.md") from None


def _private_key(what: str, pem: bytes) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, None)
    except TypeError:  # it is encrypted. OpenSSL would ask the terminal for the words, in every process
        raise ClusterError(
            f"{what} has a passphrase", "a key without one", "`openssl pkey -in KEY -out NEW` takes it off"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ClusterError(f"{what} holds no private key", "a PEM file with one", "See docs/clusters.md") from None


def of_files(files: SecurityConfig) -> Security:
    """TLS by these files."""
    return security(files.ca_file, files.cert_file, files.key_file)


def security(authority: str, certificate: str, key: str) -> Security:
    """TLS with one certificate for whichever part a process plays: client, scheduler or worker. Paths, or PEM."""
    parts = {
        f"tls_{part}_{what}": value
        for part in ("client", "scheduler", "worker")
        for what, value in (("cert", certificate), ("key", key))
    }
    return Security(require_encryption=True, tls_ca_file=authority, **parts)
