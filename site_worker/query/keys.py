"""A site's own pair of keys: the secret one never leaves its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tenseal.sealapi as seal
from numpy.typing import NDArray

from nightsplit.shared.errors import StateError
from nightsplit.shared.he.ckks import Ciphertext, Circuit, PublicKeys, written
from nightsplit.shared.storage.files import make_private_folder, write_atomic

SECRET = "secret.key"


class SecretKeys:
    """Encrypts and decrypts. Every site makes its own; whoever has the file can read all that it sent."""

    def __init__(self, circuit: Circuit, secret: seal.SecretKey) -> None:
        self.circuit = circuit
        self._secret = secret
        self._encryptor = seal.Encryptor(circuit.context, secret)
        self._decryptor = seal.Decryptor(circuit.context, secret)

    @classmethod
    def made(cls, circuit: Circuit, folder: Path, rotations: Sequence[int] = ()) -> tuple[SecretKeys, PublicKeys]:
        """New keys; the secret one is written into `folder`, which is made, readable by its owner alone.

        `rotations` are the steps by which a server will rotate slots.
        """
        generator = seal.KeyGenerator(circuit.context)
        make_private_folder(folder)
        secret = generator.secret_key()
        write_atomic(folder / SECRET, lambda path: secret.save(str(path)))  # without it, no answer can be read
        galois = written(generator.create_galois_keys(circuit.elements(rotations))) if rotations else b""
        return cls(circuit, secret), PublicKeys(written(generator.create_relin_keys()), galois)

    @classmethod
    def read(cls, circuit: Circuit, folder: Path) -> SecretKeys:
        """The keys that were made before; StateError 511 where there is no secret one of this circuit."""
        secret = seal.SecretKey()
        try:
            secret.load(circuit.context, str(folder / SECRET))
        except (RuntimeError, ValueError):
            remedy = "restore it from a backup; without it, answers to what was sent cannot be read."
            raise StateError(511, f"{folder / SECRET} is missing, damaged, or of another circuit.", remedy) from None
        return cls(circuit, secret)

    def encrypted(self, numbers: NDArray[np.float64], level: int) -> bytes:
        """The bytes of a ciphertext of at most `circuit.slots` numbers, with the scale of that level."""
        return written(self._encryptor.encrypt_symmetric(self.circuit.encode(numbers.tolist(), level)))

    def decrypted(self, ciphertext: Ciphertext) -> NDArray[np.float64]:
        """The numbers in all slots, float64 (slots,)."""
        plain = seal.Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return np.asarray(self.circuit.encoder.decode_double(plain))
