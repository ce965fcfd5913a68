"""Request of a hospital for access: made there with its own keys, and signed by the centre.

    hospital   identity.key, key.pem ──▶ NAME.request ──▶ centre ──▶ certificate.pem, password ──▶ hospital

Private keys stay in the folder where they were made. A request is no secret, but it must not be exchanged on its way:
the hospital reads the words of its fingerprint to the centre, by telephone.
"""

import base64
import binascii
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nightsplit.console.keys.ca import encode_key, subject
from nightsplit.shared.config.load import load
from nightsplit.shared.config.section import Name, PublicKeyText, Section
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.trust.identity import Identity, PublicKey, make_identity, read_identity

IDENTITY, TLS_KEY = "identity.key", "key.pem"
_DOMAIN = "nightsplit-request-1"


class Request(Section, frozen=True, kw_only=True):
    """Content of a request file.

    Attributes:
        name: name of the site.
        identity: public key that verifies the site's messages.
        certificate_request: PKCS #10 request for its TLS certificate, in PEM.
        signature: of the identity over the other three, in base64.
    """

    name: Name
    identity: PublicKeyText
    certificate_request: str
    signature: str

    @property
    def statement(self) -> bytes:
        """Bytes that the signature covers."""
        return "\0".join((_DOMAIN, self.name, self.identity, self.certificate_request)).encode()

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """Key for the TLS certificate."""
        key = x509.load_pem_x509_csr(self.certificate_request.encode()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        return key


def make_request(folder: Path, name: str) -> Path:
    """Make the keys of a worker that are missing in a folder, and a request for them; return its file.

    Raises:
        ConfigError: 103 the name is not valid, 113 a key cannot be read.
    """
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        remedy = "use small letters, digits, - and _, at most 63."
        raise ConfigError(103, f"{name!r} is not a valid name of a site.", remedy) from None
    make_private_folder(folder)
    identity = read_identity(folder / IDENTITY) if (folder / IDENTITY).exists() else make_identity(folder / IDENTITY)
    tls = _make_tls_key(folder / TLS_KEY)
    signed = x509.CertificateSigningRequestBuilder().subject_name(subject(name)).sign(tls, hashes.SHA256())
    pem = signed.public_bytes(serialization.Encoding.PEM).decode()
    draft = Request(name=name, identity=identity.public.text, certificate_request=pem, signature="")
    path = folder / f"{name}.request"
    write_atomic(path, _as_toml(draft, identity), mode=0o644)
    read_request(path)  # the name may not be valid
    return path


def read_request(path: Path) -> Request:
    """Read and verify a request; ConfigError 101-103 or 113 if it cannot be used."""
    request = load(path, Request)
    remedy = "have it made again with: nightsplit keys request NAME."
    try:
        signature = base64.b64decode(request.signature, validate=True)
        found = x509.load_pem_x509_csr(request.certificate_request.encode())
        usable = found.is_signature_valid and isinstance(found.public_key(), ec.EllipticCurvePublicKey)
    except (ValueError, binascii.Error):
        usable = False
    if not usable or not PublicKey(request.identity).verifies(signature, request.statement):
        raise ConfigError(113, f"{path} is damaged or was changed: its signatures do not fit.", remedy)
    return request


def _make_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.exists():
        write_atomic(path, encode_key(ec.generate_private_key(ec.SECP256R1())))
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ConfigError(113, f"{path}: {error}.", "delete it, so that a new one is made.") from None
    assert isinstance(key, ec.EllipticCurvePrivateKey), path
    return key


def _as_toml(request: Request, identity: Identity) -> bytes:
    signature = base64.b64encode(identity.sign(request.statement)).decode()
    signed = msgspec.structs.replace(request, signature=signature)
    fields = msgspec.structs.asdict(signed).items()
    return "".join(f"{name} = {msgspec.json.encode(value).decode()}\n" for name, value in fields).encode()
