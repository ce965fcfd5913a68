"""CKKS (Cheon, Kim, Kim and Song, ASIACRYPT 2017) on Microsoft SEAL: sums and products of encrypted numbers.

    level 3  ── multiply, rescale ──▶  level 2  ──▶  level 1  ──▶  level 0: only decryption is left

A ciphertext of level l carries the scale `CkksParameters.scales[l]` and no other, so that any two of a level can be
added exactly: each rescaling divides by a prime that is not quite a power of two, and the scales follow the primes.

SEAL reads and writes files only, hence the temporary ones; a secret key never passes through them.
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
    """What all participants of an encrypted evaluation agree on.

    Attributes:
        degree: N of the ring; a ciphertext holds N / 2 numbers.
        bits: sizes of the primes: the one that stays at level 0, one for each level above it, and the one for
            switching keys.
        scale_bits: of the scale at the highest level.
    """

    degree: int
    bits: tuple[int, ...]
    scale_bits: int

    @property
    def top(self) -> int:
        """The highest level: how many multiplications may follow each other."""
        return len(self.bits) - 2

    @property
    def slots(self) -> int:
        """FloatArray in a ciphertext."""
        return self.degree // 2

    @cached_property
    def context(self) -> Any:
        """SEAL's context, at 128-bit security; ValueError where the primes are too large for it and the degree."""
        parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
        parameters.set_poly_modulus_degree(self.degree)
        parameters.set_coeff_modulus(seal.CoeffModulus.Create(self.degree, list(self.bits)))
        context = seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)
        if not context.parameters_set():
            raise ValueError(context.parameters_error_message())
        return context

    @cached_property
    def ids(self) -> list[Any]:
        """SEAL's name of each level, from level 0."""
        data = self.context.first_context_data()
        found = [data.parms_id()]
        while data.chain_index():
            data = data.next_context_data()
            found.append(data.parms_id())
        return found[::-1]

    @cached_property
    def primes(self) -> list[int]:
        """The prime that a level is left by, from level 0."""
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
        """FloatArray to polynomials and back."""
        return seal.CKKSEncoder(self.context)

    def level_of(self, ciphertext: Ciphertext) -> int:
        """See the drawing."""
        return int(ciphertext.coeff_modulus_size()) - 1

    def encode(self, values: float | Sequence[float], level: int, scale: float | None = None) -> Plaintext:
        """A plaintext of a level: the same number in every slot, or a number for each (the others are 0)."""
        plain, numbers = seal.Plaintext(), values if isinstance(values, float) else list(values)
        self.encoder.encode(numbers, self.ids[level], scale or self.scales[level], plain)
        return plain

    def read(self, content: bytes, level: int) -> Ciphertext:
        """A ciphertext to compute with; Refused 313 unless it is of these parameters, that level and its scale."""
        found = self.read_any(content)
        if self.level_of(found) != level or found.scale != self.scales[level]:
            raise mismatch(f"a ciphertext is not of level {level}.", 313)
        return found

    def read_any(self, content: bytes) -> Ciphertext:
        """A ciphertext to decrypt; Refused 313 unless it is of these parameters."""
        found = self._load(seal.Ciphertext(), content)
        # SEAL reads these, and fails on them later, or shows what was never encrypted.
        if found.size() != 2 or not found.is_ntt_form() or found.is_transparent() or found.scale not in self.scales:
            raise mismatch("a ciphertext has not the form it should.", 313)
        return found

    def read_relin(self, content: bytes) -> Any:
        """Relinearization keys; Refused 313 unless they are of these parameters."""
        keys = self._load(seal.RelinKeys(), content)
        if not keys.has_key(2):  # Galois keys have the same form, and SEAL does not look before it multiplies
            raise mismatch("relinearization keys are absent.", 313)
        return keys

    def read_galois(self, content: bytes, rotations: Sequence[int]) -> Any:
        """Galois keys; Refused 313 unless they are of these parameters, and for all of these steps."""
        keys = self._load(seal.GaloisKeys(), content)
        if not all(map(keys.has_key, self.elements(rotations))):
            raise mismatch("a key for a rotation is absent.", 313)
        return keys

    def elements(self, rotations: Sequence[int]) -> list[int]:
        """Galois elements: what SEAL takes where it should take steps."""
        return [pow(3, step, 2 * self.degree) for step in rotations]

    def _load(self, into: Any, content: bytes) -> Any:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                into.load(self.context, file.name)  # checks that the numbers are below their primes
                return into
            except (RuntimeError, ValueError):
                raise Refused(313, "a ciphertext or key is damaged, or another ckks's.", "send it again.") from None


def to_bytes(encrypted: Any) -> bytes:
    """The bytes of a ciphertext, or of a public key; what was encrypted symmetrically has half the size."""
    with tempfile.NamedTemporaryFile() as file:
        encrypted.save(file.name)
        return Path(file.name).read_bytes()


@dataclass(frozen=True)
class PublicKeys:
    """What a server needs to compute with a site's ciphertexts, and cannot decrypt with.

    Attributes:
        relin: bytes of the relinearization keys.
        galois: bytes of the keys for rotations; empty where the packing needs none.
    """

    relin: bytes
    galois: bytes

    @property
    def content(self) -> bytes:
        """Both, for a file."""
        return len(self.relin).to_bytes(8, "big") + self.relin + self.galois

    @classmethod
    def of(cls, content: bytes) -> PublicKeys:
        """From `content`."""
        end = 8 + int.from_bytes(content[:8], "big")
        return cls(content[8:end], content[end:])

    @cached_property
    def sha256(self) -> str:
        """The name of this pair of keys."""
        return hashlib.sha256(self.content).hexdigest()
