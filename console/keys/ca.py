"""The consortium's own certificate authority: X.509 (RFC 5280) with ECDSA keys on P-256."""

import ipaddress
import secrets
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nightsplit.shared.errors import ConfigError
from nightsplit.shared.storage.files import make_private_folder, write_atomic

CENTRE_DAYS, WORKER_DAYS = 3650, 825
_USAGES = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
CLOCK_SKEW = timedelta(days=1)
"""Certificates are valid from this long before they are made, for hospitals with a slow clock."""


class Authority:
    """Certificate authority.

    Args:
        folder: folder of ca.pem and ca.key; both are made if there is no ca.pem.

    Raises:
        ConfigError: 113 the files cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        certificate, key = folder / "ca.pem", folder / "ca.key"
        if not certificate.exists():
            make_private_folder(folder)
            own = ec.generate_private_key(ec.SECP256R1())
            write_atomic(key, encode_key(own))  # first: where a certificate is, its key is, too
            write_atomic(certificate, _sign_root(own).public_bytes(serialization.Encoding.PEM))
        try:
            found = serialization.load_pem_private_key(key.read_bytes(), password=None)
            self._certificate = x509.load_pem_x509_certificate(certificate.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(113, f"{folder}: {error}.", "restore ca.pem and ca.key from your backup.") from None
        assert isinstance(found, ec.EllipticCurvePrivateKey)
        self._key = found

    @property
    def pem(self) -> bytes:
        """Certificate of the authority, in PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str, certificate: Path, key: Path, hosts: Collection[str] = ()) -> None:
        """Write a new key and a certificate for it, see `sign`; only its owner can read the key."""
        own = ec.generate_private_key(ec.SECP256R1())
        write_atomic(key, encode_key(own))
        write_atomic(certificate, self.sign(name, own.public_key(), hosts))

    def sign(self, name: str, key: ec.EllipticCurvePublicKey, hosts: Collection[str] = ()) -> bytes:
        """Return a certificate in PEM: for ten years of a service, for 825 days of a worker.

        Args:
            name: common name of the certificate.
            key: key of its owner.
            hosts: names and addresses of a service; none for a worker, which listens for its metrics alone:
                its certificate names "<name>.nightsplit", which is no real host.
        """
        names = [_general_name(host) for host in sorted(hosts) or [f"{name}.nightsplit"]]
        signed = (
            _builder(name, CENTRE_DAYS if hosts else WORKER_DAYS)
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_USAGES), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return signed.public_bytes(serialization.Encoding.PEM)


def new_password() -> str:
    """Return 192 random bits as text that needs no quoting."""
    return secrets.token_urlsafe(24)


def _sign_root(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = "nightsplit authority"
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
         "key_agreement", "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    return (
        _builder(name, CENTRE_DAYS)
        .issuer_name(subject(name))
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage, key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(name: str, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject(name))
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def subject(name: str) -> x509.Name:
    """Return a subject of which only the common name is set."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def encode_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key in PEM, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
