"""A site's own keys: the secret key never leaves its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tenseal.sealapi as seal

from nightsplit.shared.errors import StateError
from nightsplit.shared.he.ckks import Ciphertext, CkksParameters, PublicKeys, to_bytes
from nightsplit.shared.he.weights import FloatArray
from nightsplit.shared.storage.files import make_private_folder, write_atomic

SECRET = "secret.key"


class SecretKeys:
    """Secret key of a site, to encrypt and decrypt; its file decrypts everything that the site has sent."""

    def __init__(self, ckks: CkksParameters, secret: seal.SecretKey) -> None:
        self.ckks = ckks
        self._secret = secret
        self._encryptor = seal.Encryptor(ckks.context, secret)
        self._decryptor = seal.Decryptor(ckks.context, secret)

    @classmethod
    def make(cls, ckks: CkksParameters, folder: Path, rotations: Sequence[int] = ()) -> tuple[SecretKeys, PublicKeys]:
        """Make keys, and write the secret key to `folder`, which is created with access for its owner only.

        `rotations` are the steps by which a server will rotate slots.
        """
        generator = seal.KeyGenerator(ckks.context)
        make_private_folder(folder)
        secret = generator.secret_key()
        write_atomic(folder / SECRET, lambda path: secret.save(str(path)))  # without it, no answer can be read
        galois = to_bytes(generator.create_galois_keys(ckks.galois_elements(rotations))) if rotations else b""
        return cls(ckks, secret), PublicKeys(to_bytes(generator.create_relin_keys()), galois)

    @classmethod
    def read(cls, ckks: CkksParameters, folder: Path) -> SecretKeys:
        """Read the key in `folder`; StateError 511 if there is none with these parameters."""
        secret = seal.SecretKey()
        try:
            secret.load(ckks.context, str(folder / SECRET))
        except (RuntimeError, ValueError):
            sentence = f"{folder / SECRET} is missing, damaged, or was made for another model."
            remedy = "restore it from a backup; without it, answers to the queries already sent cannot be decrypted."
            raise StateError(511, sentence, remedy) from None
        return cls(ckks, secret)

    def encrypt(self, numbers: FloatArray, level: int) -> bytes:
        """Encrypt at most `ckks.slots` numbers, with the scale of a level; return the ciphertext's bytes."""
        return to_bytes(self._encryptor.encrypt_symmetric(self.ckks.encode(numbers.tolist(), level)))

    def decrypt(self, ciphertext: Ciphertext) -> FloatArray:
        """Return the numbers in all slots, float64 (slots,)."""
        plain = seal.Plaintext()
        self._decryptor.decrypt(ciphertext, plain)
        return np.asarray(self.ckks.encoder.decode_double(plain))
