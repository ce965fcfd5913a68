"""The site's secret, and the random numbers of differential privacy, which are derived from it.

They are a function of (secret, run, purpose, step): a replay after a crash draws the same numbers, and run.toml alone
does not reveal them. Torch's generator is not safe: on the CPU it uses 32 bits of its seed, so a server could try all
seeds and subtract the noise.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from nightsplit.shared.errors import RunError
from nightsplit.shared.storage.files import make_secret_file, read_secret_file

_BLOCK = 2**18
"""Normals per block, to keep the memory small for large models."""
_DRAWS = 4
"""Draws that are summed for each normal of the secure stream."""


@dataclass(frozen=True)
class Secret:
    """32 bytes that never leave the site, or bytes derived from them."""

    key: bytes = field(repr=False)

    def derive(self, *purpose: str | int | bytes) -> Secret:
        """Derive a secret for a purpose: HMAC-SHA256 of its parts."""
        parts = [part if isinstance(part, bytes) else str(part).encode() for part in purpose]
        text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return Secret(hmac.digest(self.key, text, hashlib.sha256))

    def records(self, count: int, rate: float) -> npt.NDArray[np.int64]:
        """Return the indices of a Poisson sample of `count` records, each with probability `rate`; may be empty."""
        return np.flatnonzero(_Keystream(self.key).uniform(count) < rate)

    def normals(self, count: int, *, secure: bool) -> npt.NDArray[np.float32]:
        """Return `count` independent standard normals, float32.

        If `secure`, they come from the cryptographic stream ChaCha20; each is half the sum of four draws in float64,
        so that the gaps between floating-point numbers do not reveal the value under the noise (Mironov, CCS 2012;
        Holohan and Braghin, ESORICS 2021; Opacus does the same in its secure mode). Otherwise they come from Philox,
        which has a key of 128 bits but is not a cryptographic generator.
        """
        if not secure:
            philox = np.random.Philox(key=int.from_bytes(self.key[:16], "big"))
            return np.random.Generator(philox).standard_normal(count, dtype=np.float32)
        stream = _Keystream(self.key)
        normals = np.empty(count, dtype=np.float32)
        for start in range(0, count, _BLOCK):
            length = min(_BLOCK, count - start)
            draws = stream.normals(_DRAWS * length).reshape(_DRAWS, length)
            normals[start : start + length] = draws.sum(axis=0) / np.sqrt(_DRAWS)
        return normals


def read_secret(path: Path) -> Secret:
    """Read the secret in `path`.

    Raises:
        RunError: 612 other users may read the file, or it holds no secret.
        OSError: it cannot be read.
    """
    try:
        return Secret(read_secret_file(path))
    except ValueError as error:
        remedy = f"chmod 600 {path}, or restore it from a backup, with its ledger."
        raise RunError(612, f"{path} {error}.", remedy) from None


def make_secret(path: Path) -> Secret:
    """Write a new secret to `path`; raises as `make_secret_file`."""
    return Secret(make_secret_file(path))


class _Keystream:
    """Random numbers from ChaCha20, with a key that is used for this stream only."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return numbers in [0, 1), multiples of 2**-53."""
        integers = np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")
        return (integers >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normals(self, count: int) -> npt.NDArray[np.float64]:
        """Return standard normals (Box and Muller, 1958)."""
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(half)))
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
