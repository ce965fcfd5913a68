"""A site's own pair of keys: the secret one never leaves its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from nightsplit.shared.errors import StateError
from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, PublicKeys, to_bytes
from nightsplit.shared.storage.files import make_private_folder, write_atomic

SECRET = "secret.key"


class SecretKeys:
    """Encrypts and decrypts. Every site makes its own; whoever has the file can read all that it sent."""

    def __init__(self, ckks: CkksParameters, secret: seal.SecretKey) -> None:
        self.ckks = ckks
        self._secret = secret
        self._encryptor = seal.Encryptor(ckks.context, secret)
        self._decryptor = seal.Decryptor(ckks.context, secret)

    @classmethod
    def made(cls, ckks: CkksParameters, folder: Path, rotations: Sequence[int] = ()) -> tuple[SecretKeys, PublicKeys]:
        """New keys; the secret one is to_bytes into `folder`, which is made, readable by its owner alone.

        `rotations` are the steps by which a server will rotate slots.
        """
        generator = seal.KeyGenerator(ckks.context)
        make_private_folder(folder)
        secret = generator.secret_key()
        write_atomic(folder / SECRET, lambda path: secret.save(str(path)))  # without it, no answer can be read
        galois = to_bytes(generator.create_galois_keys(ckks.elements(rotations))) if rotations else b""
        return cls(ckks, secret), PublicKeys(to_bytes(generator.create_relin_keys()), galois)

    @classmethod
    def read(cls, ckks: CkksParameters, folder: Path) -> SecretKeys:
        """The keys that were made before; StateError 511 where there is no secret one of these parameters."""
        secret = seal.SecretKey()
        try:
            secret.load(ckks.context, str(folder / SECRET))
        except (RuntimeError, ValueError):
            remedy = "restore it from a backup; without it, answers to what was sent cannot be read."
            raise StateError(511, f"{folder / SECRET} is missing, damaged, or of another ckks.", remedy) from None
        return cls(ckks, secret)

    def encrypted(self, numbers: NDArray[np.float64], level: int) -> bytes:
        """The bytes of a ciphertext of at most `ckks.slots` numbers, with the scale of that level."""
        return to_bytes(self._encryptor.encrypt_symmetric(self.ckks.encode(numbers.tolist(), level)))

    def decrypted(self, ciphertext: Ciphertext) -> NDArray[np.float64]:
        """The numbers in all slots, float64 (slots,)."""
        plain = seal.Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return np.asarray(self.ckks.encoder.decode_double(plain))
