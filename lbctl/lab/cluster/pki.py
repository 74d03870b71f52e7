"""Keys, certificates, bearer tokens and kubeconfigs of a lab cluster, embedded or real.

Rules: everything is EC P-256 (a key costs a millisecond; kube-apiserver takes it for TLS and for
ServiceAccount tokens alike), lives in one directory, and private files have mode 0600. Made once:
`create` on a directory that has it all already returns what is there, so a restart keeps trust.
"""

from __future__ import annotations

import base64
import csv
import datetime as dt
import ipaddress
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lbctl.errors import LabError

ADMIN: Final = "admin"
_LIFETIME: Final = dt.timedelta(days=365)
_SKEW: Final = dt.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Identity:
    """A user with a static bearer token: a line of kube-apiserver's --token-auth-file."""

    user: str
    groups: tuple[str, ...] = ()


ADMIN_IDENTITY: Final = Identity(ADMIN, ("system:masters",))


@dataclass(frozen=True, slots=True)
class Pki:
    """The files of one cluster. All paths are absolute if `directory` was."""

    directory: Path

    @property
    def ca_cert(self) -> Path:
        """PEM certificate of the CA: what clients trust."""
        return self.directory / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """PEM private key of the CA."""
        return self.directory / "ca.key"

    @property
    def server_cert(self) -> Path:
        """PEM certificate of the API server (--tls-cert-file)."""
        return self.directory / "server.crt"

    @property
    def server_key(self) -> Path:
        """PEM private key of the API server (--tls-private-key-file)."""
        return self.directory / "server.key"

    @property
    def sa_key(self) -> Path:
        """PEM key that signs ServiceAccount tokens (--service-account-signing-key-file)."""
        return self.directory / "sa.key"

    @property
    def sa_pub(self) -> Path:
        """PEM public key that checks them (--service-account-key-file)."""
        return self.directory / "sa.pub"

    @property
    def token_file(self) -> Path:
        """CSV `token,user,uid,"group1,group2"` (--token-auth-file)."""
        return self.directory / "tokens.csv"

    def token(self, user: str = ADMIN) -> str:
        """The bearer token of `user`. Raises LabError when it has none."""
        for row in read_tokens(self.token_file):
            if row[1] == user:
                return row[0]
        raise LabError(f"{self.token_file} has no token of user {user}")


def create(
    directory: Path, names: Iterable[str], identities: Iterable[Identity] = (ADMIN_IDENTITY,)
) -> Pki:
    """Make (or find) everything that an API server needs, in `directory` (created, mode 0700).

    `names` are the server certificate's names, DNS or IP. A CA, signing key or token that exists is
    kept; the server certificate is made anew when its names differ.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    pki = Pki(directory)
    if not (pki.ca_key.exists() and pki.ca_cert.exists()):
        _make_ca(pki)
    wanted = tuple(sorted(set(names)))
    if not pki.server_cert.exists() or _names_of(pki.server_cert) != wanted:
        issue(pki, pki.server_cert, pki.server_key, "kube-apiserver", wanted)
    if not (pki.sa_key.exists() and pki.sa_pub.exists()):
        key = ec.generate_private_key(ec.SECP256R1())
        _write(pki.sa_key, _private_pem(key))
        _write(pki.sa_pub, public_pem(key.public_key()))
    _make_tokens(pki, tuple(identities))
    return pki


def issue(
    pki: Pki,
    cert_file: Path,
    key_file: Path,
    common_name: str,
    names: Iterable[str] = (),
    organizations: Iterable[str] = (),
) -> None:
    """Write a key and a certificate for server and client use, signed by the CA.

    For a Kubernetes client `common_name` is the user and `organizations` are its groups.
    """
    ca = x509.load_pem_x509_certificate(pki.ca_cert.read_bytes())
    ca_key = load_private_key(pki.ca_key)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, o) for o in organizations]
        + [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    )
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        _builder(subject, ca.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
    )
    sans = [_general_name(name) for name in names]
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    _write(key_file, _private_pem(key))
    _write(cert_file, builder.sign(ca_key, hashes.SHA256()).public_bytes(_PEM))


def write_kubeconfig(path: Path, url: str, ca_file: Path, token: str, user: str = ADMIN) -> Path:
    """Write a kubeconfig (mode 0600, JSON, which is YAML) for `user` with a bearer token."""
    ca = ca_file.read_bytes()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": "lab", "cluster": {"server": url, "certificate-authority-data": _b64(ca)}}
        ],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": user}}],
        "current-context": "lab",
    }
    _write(path, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    return path


def read_tokens(path: Path) -> tuple[tuple[str, str, str, tuple[str, ...]], ...]:
    """(token, user, uid, groups) of each line of a token file."""
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file, skipinitialspace=True) if row]
    return tuple(
        (row[0], row[1], row[2], tuple(row[3].split(",")) if len(row) > 3 and row[3] else ())
        for row in rows
    )


def load_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The EC key of a PEM file. Raises LabError for anything else."""
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LabError(f"{path} is not an EC private key")
    return key


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo in PEM."""
    return key.public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


_PEM: Final = serialization.Encoding.PEM


def _make_ca(pki: Pki) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lbctl-lab-ca")])
    cert = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(pki.ca_key, _private_pem(key))
    _write(pki.ca_cert, cert.public_bytes(_PEM))


def _make_tokens(pki: Pki, identities: tuple[Identity, ...]) -> None:
    known = {row[1]: row for row in read_tokens(pki.token_file)} if pki.token_file.exists() else {}
    missing = [identity for identity in identities if identity.user not in known]
    if not missing:
        return
    for identity in missing:
        known[identity.user] = (
            secrets.token_urlsafe(32),
            identity.user,
            identity.user,
            identity.groups,
        )
    lines = [
        f'{token},{user},{uid},"{",".join(groups)}"\n'
        for token, user, uid, groups in known.values()
    ]
    _write(pki.token_file, "".join(lines).encode())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + _LIFETIME)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names_of(cert_file: Path) -> tuple[str, ...]:
    cert = x509.load_pem_x509_certificate(cert_file.read_bytes())
    try:
        sans = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    dns = sans.get_values_for_type(x509.DNSName)
    addresses = [str(a) for a in sans.get_values_for_type(x509.IPAddress)]
    return tuple(sorted({*dns, *addresses}))


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step, never readable by others."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)
