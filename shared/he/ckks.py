"""CKKS (Cheon, Kim, Kim and Song, ASIACRYPT 2017) on Microsoft SEAL: sums and products of encrypted numbers.

    level 3  ── multiply, rescale ──▶  level 2  ──▶  level 1  ──▶  level 0: decryption only

A ciphertext of level l always has the scale `CkksParameters.scales[l]`, so that any two of a level can be added
exactly: each rescaling divides by a prime that is not quite a power of two, and the scales follow the primes.

SEAL reads and writes only files, hence the temporary ones; a secret key is never written to them.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import tenseal.sealapi as seal

from nightsplit.shared.errors import Refused, mismatch

Ciphertext: TypeAlias = Any  # seal.Ciphertext, which has no types
Plaintext: TypeAlias = Any  # seal.Plaintext, likewise


@dataclass(frozen=True)
class CkksParameters:
    """CKKS parameters, the same for all participants of an encrypted evaluation.

    Attributes:
        degree: N of the ring; a ciphertext holds N / 2 numbers.
        bits: sizes of the primes in bits: that of level 0, one for each level above it, and that for switching keys.
        scale_bits: binary logarithm of the scale at the highest level.
    """

    degree: int
    bits: tuple[int, ...]
    scale_bits: int

    @property
    def top(self) -> int:
        """Highest level, which is the number of multiplications that may follow each other."""
        return len(self.bits) - 2

    @property
    def slots(self) -> int:
        """Numbers in a ciphertext."""
        return self.degree // 2

    @cached_property
    def context(self) -> Any:
        """SEAL's context at 128-bit security; ValueError if the primes are too large for the degree."""
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(self.degree)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(self.degree, list(self.bits)))
        context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        if not context.parameters_set():
            raise ValueError(context.parameters_error_message())
        return context

    @cached_property
    def ids(self) -> list[Any]:
        """SEAL's id of each level, from level 0."""
        data = self.context.first_context_data()
        found = [data.parms_id()]
        while data.chain_index():
            data = data.next_context_data()
            found.append(data.parms_id())
        return found[::-1]

    @cached_property
    def primes(self) -> list[int]:
        """Prime that rescaling divides by at each level, from level 0."""
        return [prime.value() for prime in self.context.first_context_data().parms().coeff_modulus()]

    @cached_property
    def scales(self) -> list[float]:
        """Scale of a ciphertext of each level, from level 0."""
        scales = [2.0**self.scale_bits]
        for level in range(self.top, 0, -1):
            scales.append(scales[-1] ** 2 / self.primes[level])
        return scales[::-1]

    @cached_property
    def encoder(self) -> Any:
        """Encoder between numbers and polynomials."""
        return seal.CKKSEncoder(self.context)

    def level_of(self, ciphertext: Ciphertext) -> int:
        """Return the number of multiplications left to a ciphertext."""
        return int(ciphertext.coeff_modulus_size()) - 1

    def encode(self, values: float | Sequence[float], level: int, scale: float | None = None) -> Plaintext:
        """Encode a plaintext of a level: one number for every slot, or one per slot (the rest are 0)."""
        numbers = values if isinstance(values, float) else list(values)
        plain = seal.Plaintext()
        self.encoder.encode(numbers, self.ids[level], scale or self.scales[level], plain)
        return plain

    def read(self, content: bytes, level: int) -> Ciphertext:
        """Read a ciphertext to compute with; Refused 313 unless it has these parameters, that level and its scale."""
        found = self.read_any(content)
        if self.level_of(found) != level or found.scale != self.scales[level]:
            raise mismatch(f"a ciphertext is not at level {level}.", 313)
        return found

    def read_any(self, content: bytes) -> Ciphertext:
        """Read a ciphertext to decrypt; Refused 313 unless it has these parameters."""
        found = self._load(seal.Ciphertext(), content)
        # SEAL loads these, but fails on them later, or decrypts a ciphertext that hides nothing.
        if found.size() != 2 or not found.is_ntt_form() or found.is_transparent() or found.scale not in self.scales:
            raise mismatch("a ciphertext has the wrong form.", 313)
        return found

    def read_relin(self, content: bytes) -> Any:
        """Read relinearization keys; Refused 313 unless they have these parameters."""
        keys = self._load(seal.RelinKeys(), content)
        if not keys.has_key(2):  # Galois keys have the same form, and SEAL multiplies without a check
            raise mismatch("relinearization keys are missing.", 313)
        return keys

    def read_galois(self, content: bytes, rotations: Sequence[int]) -> Any:
        """Read Galois keys; Refused 313 unless they have these parameters and include all of these steps."""
        keys = self._load(seal.GaloisKeys(), content)
        if not all(map(keys.has_key, self.galois_elements(rotations))):
            raise mismatch("a key for a rotation is missing.", 313)
        return keys

    def galois_elements(self, rotations: Sequence[int]) -> list[int]:
        """Return the Galois elements of these steps, by which SEAL names the keys."""
        return [pow(3, step, 2 * self.degree) for step in rotations]

    def _load(self, into: Any, content: bytes) -> Any:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                into.load(self.context, file.name)  # checks that the numbers are below their primes
                return into
            except (RuntimeError, ValueError):
                sentence = "a ciphertext or key is damaged, or has other parameters."
                raise Refused(313, sentence, "send it again.") from None


def to_bytes(encrypted: Any) -> bytes:
    """Serialize a ciphertext or a public key; symmetric encryption halves the size."""
    with tempfile.NamedTemporaryFile() as file:
        encrypted.save(file.name)
        return Path(file.name).read_bytes()


@dataclass(frozen=True)
class PublicKeys:
    """Keys with which a server computes with a site's ciphertexts, but cannot decrypt them.

    Attributes:
        relin: bytes of the relinearization keys.
        galois: bytes of the keys for rotations; empty if the packing needs none.
    """

    relin: bytes
    galois: bytes

    @property
    def content(self) -> bytes:
        """Both keys as the bytes of a file."""
        return len(self.relin).to_bytes(8, "big") + self.relin + self.galois

    @classmethod
    def of(cls, content: bytes) -> PublicKeys:
        """Read the keys in `content`."""
        end = 8 + int.from_bytes(content[:8], "big")
        return cls(content[8:end], content[end:])

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of `content`, the name of this pair of keys."""
        return hashlib.sha256(self.content).hexdigest()
