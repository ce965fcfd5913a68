"""Identities: the Ed25519 key with which a worker signs, and the public keys in run.toml that verify it."""

import base64
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nightsplit.shared.errors import ConfigError
from nightsplit.shared.storage.files import make_secret_file, read_secret_file

PREFIX = "ed25519:"
SIGNATURE_BYTES = 64
WORDS = 6
"""Words of a fingerprint: 96 bits, beyond a search for a second key with the same words."""

_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aiou"


@dataclass(frozen=True)
class PublicKey:
    """Public key of a worker, as run.toml holds it: "ed25519:" and 32 bytes in base64."""

    text: str

    @property
    def words(self) -> str:
        """Fingerprint to be read aloud, such as "lusab babad gutih ...": SHA-256 in the spelling of Wilkerson
        (arXiv:0901.4016), 16 bits a word.
        """
        digest = hashlib.sha256(_decode(self.text)).digest()
        return " ".join(_spell(int.from_bytes(digest[2 * n : 2 * n + 2], "big")) for n in range(WORDS))

    def verifies(self, signature: bytes, statement: bytes) -> bool:
        """Return whether the owner of this key has signed a statement."""
        with suppress(InvalidSignature, ValueError):
            self._key.verify(signature, statement)
            return True
        return False

    @cached_property
    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(_decode(self.text))


class Identity:
    """Private key of a worker (Ed25519, RFC 8032)."""

    def __init__(self, secret: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = PublicKey(PREFIX + base64.b64encode(self._key.public_key().public_bytes_raw()).decode())

    def sign(self, statement: bytes) -> bytes:
        """Return the signature of a statement, 64 bytes."""
        return self._key.sign(statement)


def make_identity(path: Path) -> Identity:
    """Create an identity in a file that only its owner can read; FileExistsError, OSError."""
    return Identity(make_secret_file(path))


def read_identity(path: Path) -> Identity:
    """Read an identity; ConfigError 113 if its file cannot be used."""
    try:
        return Identity(read_secret_file(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "set identity to the file that nightsplit keys made; only its owner may read it."
        raise ConfigError(113, f"{path}: {reason}.", remedy) from None


def _decode(text: str) -> bytes:
    return base64.b64decode(text.removeprefix(PREFIX))


def _spell(number: int) -> str:
    """Spell 16 bits as consonant, vowel, consonant, vowel, consonant."""
    letters = (_CONSONANTS[number >> 12], _VOWELS[number >> 10 & 3], _CONSONANTS[number >> 6 & 15],
               _VOWELS[number >> 4 & 3], _CONSONANTS[number & 15])  # fmt: skip
    return "".join(letters)
