"""Envelope: signature and seal around an unchanged wire message.

    prefix   "NSE1" | mode | run key of the sender, 32 | process, 16 | counter, 8
    sealed   prefix | AES-256-GCM(signature, 64 | message)         mode 1
    signed   prefix | signature, 64 | message                      mode 0, before the receiver's run key is known

    signature   Ed25519 of (domain | context | prefix | SHA-256 of the message)
    context     SHA-256 of run digest, run, sender and receiver: a copy on another way is no valid message
    key         HKDF(X25519(run keys); salt = run digest, info = context | both run keys), expanded by `process`
    nonce       counter of the process

A process draws its id at random, and counts: so a key never meets one nonce twice, whatever a replay after a crash
computes. A nonce derived from a message's id would fail there: AES-GCM reveals both messages when a repeated one
differs by a bit. The signature is inside the seal, since with a signature in the clear a broker could confirm a guess
of a short message. As in DSSE, the very bytes that were signed are those that are parsed.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from nightsplit.shared.errors import Refused
from nightsplit.shared.trust.identity import SIGNATURE_BYTES, Identity, PublicKey
from nightsplit.shared.trust.run_keys import KEY_BYTES, RunKeys
from nightsplit.shared.trust.witness import cosign

_MAGIC = b"NSE1"
_DOMAIN = b"nightsplit-envelope-1\0"
_PREFIX = Struct(f">4sB{KEY_BYTES}s16sQ")
_SIGNED, _SEALED = 0, 1
_CIPHERS_MAX = 256
"""Largest number of ciphers that are remembered: one for each process of a peer that sent something lately."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Verified envelope.

    Attributes:
        content: the message.
        sealed: whether only the receiver could read it.
        run_key: the sender's public key of the run.
    """

    content: bytes
    sealed: bool
    run_key: bytes


class Sealer:
    """Envelopes of one worker in one run.

    Args:
        digest: the run's digest.
        name: this worker.
        identity: its private key.
        parties: public keys of all participants by name.
        keys: keys of the run.
    """

    def __init__(
        self, run: str, digest: str, name: str, identity: Identity, parties: Mapping[str, PublicKey], keys: RunKeys
    ) -> None:  # fmt: skip
        self._run, self._digest, self._name = run, bytes.fromhex(digest), name
        self._identity, self._parties = identity, parties
        self.keys = keys
        self._process = secrets.token_bytes(16)
        self._counter = 0
        self._ciphers: OrderedDict[bytes, AESGCM] = OrderedDict()
        self._context = lru_cache(maxsize=None)(self._hash_names)

    def cosign(self, site: str, lines: int, head: str) -> str:
        """Sign the head of a site's exit log, as the server of the run."""
        return cosign(self._identity, self._digest.hex(), site, lines, head)

    def can_seal(self, receiver: str) -> bool:
        """Return whether the receiver's run key is known."""
        return self.keys.peer(receiver) is not None

    def sign(self, receiver: str, content: bytes) -> bytes:
        """Return an envelope that everybody can read."""
        prefix = self._next_prefix(_SIGNED)
        return b"".join((prefix, self._identity.sign(self._statement(self._name, receiver, prefix, content)), content))

    def seal(self, receiver: str, content: bytes) -> bytes:
        """Return an envelope that only the receiver can read; its run key must be known."""
        prefix = self._next_prefix(_SEALED)
        signature = self._identity.sign(self._statement(self._name, receiver, prefix, content))
        theirs = self.keys.peer(receiver)
        assert theirs is not None, receiver
        cipher_name, cipher = self._cipher(self._name, receiver, theirs, prefix)
        self._remember(cipher_name, cipher)
        return prefix + cipher.encrypt(_nonce(prefix), signature + content, prefix)

    def open(self, sender: str, receiver: str, body: bytes) -> Opened:
        """Verify an envelope, and decrypt it; one of this worker itself, too.

        Raises:
            Refused: 317 it is none, is damaged, or comes from someone else or from another run.
        """
        prefix, rest = body[: _PREFIX.size], memoryview(body)[_PREFIX.size :]
        if not body.startswith(_MAGIC) or len(rest) < SIGNATURE_BYTES or prefix[len(_MAGIC)] not in (_SIGNED, _SEALED):
            raise _refusal(f"a message in the name of {sender} has no signature.")
        is_sealed, public = prefix[len(_MAGIC)] == _SEALED, _PREFIX.unpack(prefix)[2]
        cipher_name, cipher = b"", None
        if is_sealed:
            theirs = public if sender != self._name else self.keys.peer(receiver)
            try:
                cipher_name, cipher = self._cipher(sender, receiver, theirs or public, prefix)
                rest = memoryview(cipher.decrypt(_nonce(prefix), rest, prefix))
            except (InvalidTag, ValueError):
                sentence = f"a message in the name of {sender} is damaged, or was sealed for another run or receiver."
                raise _refusal(sentence) from None
        signature, content = bytes(rest[:SIGNATURE_BYTES]), bytes(rest[SIGNATURE_BYTES:])
        if not self._parties[sender].verifies(signature, self._statement(sender, receiver, prefix, content)):
            raise _refusal(f"a message in the name of {sender} is not signed by its key.")
        if cipher is not None:
            self._remember(cipher_name, cipher)
        return Opened(content, is_sealed, public)

    def _next_prefix(self, mode: int) -> bytes:
        self._counter += 1
        return _PREFIX.pack(_MAGIC, mode, self.keys.public, self._process, self._counter)

    def _hash_names(self, sender: str, receiver: str) -> bytes:
        parts = self._digest, self._run.encode(), sender.encode(), receiver.encode()
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).digest()

    def _statement(self, sender: str, receiver: str, prefix: bytes, content: bytes) -> bytes:
        return _DOMAIN + self._context(sender, receiver) + prefix + hashlib.sha256(content).digest()

    def _cipher(self, sender: str, receiver: str, theirs: bytes, prefix: bytes) -> tuple[bytes, AESGCM]:
        """Return the cipher of one process on one way, and its name."""
        _, _, of_sender, process, _ = _PREFIX.unpack(prefix)
        of_receiver = theirs if sender == self._name else self.keys.public
        name = self._context(sender, receiver) + of_sender + of_receiver + process
        if name in self._ciphers:
            return name, self._ciphers[name]
        info = name[: -len(process)]
        key = HKDF(SHA256(), KEY_BYTES, salt=self._digest, info=info).derive(self.keys.exchange(theirs))
        return name, AESGCM(HKDFExpand(SHA256(), KEY_BYTES, info=process).derive(key))

    def _remember(self, name: bytes, cipher: AESGCM) -> None:
        # Only ciphers of verified messages: others may name any process.
        self._ciphers[name] = cipher
        self._ciphers.move_to_end(name)
        if len(self._ciphers) > _CIPHERS_MAX:
            self._ciphers.popitem(last=False)


def _nonce(prefix: bytes) -> bytes:
    return bytes(4) + prefix[-8:]


def _refusal(sentence: str) -> Refused:
    remedy = "look for the cause at the broker: the genuine message is still awaited, and nothing was applied."
    return Refused(317, sentence, remedy)
