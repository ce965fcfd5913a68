"""Keys of one run: the X25519 key of this worker, and those that its peers sent.

    <state>/run_keys/own.key       32 bytes, made when the run begins and deleted when it is over
                     <peer>.pub    32 bytes, from the peer's last verified message

With the last private key of a run its recorded messages become unreadable for everybody (forward secrecy), although
the identities that signed them live on.
"""

from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import (
    force_to_disk,
    make_private_folder,
    make_secret_file,
    read_secret_file,
    write_atomic,
)

KEY_BYTES = 32


class RunKeys:
    """Keys in a folder, which is created with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._private: X25519PrivateKey | None = None
        self._public = b""
        self._peers: dict[str, bytes] = {}

    @property
    def public(self) -> bytes:
        """Public half of this worker's key."""
        self._own()
        return self._public

    def exchange(self, public: bytes) -> bytes:
        """Return the secret that the owners of this key and of `public` share; ValueError for a degenerate key."""
        return self._own().exchange(X25519PublicKey.from_public_bytes(public))

    def peer(self, name: str) -> bytes | None:
        """Return a peer's public key; None before its first message."""
        if name not in self._peers:
            with suppress(FileNotFoundError):
                self._peers[name] = (self.folder / f"{name}.pub").read_bytes()
        return self._peers.get(name)

    def learn(self, name: str, public: bytes) -> None:
        """Keep the public key of a peer's verified message, durably."""
        if self.peer(name) != public:
            make_private_folder(self.folder)
            write_atomic(self.folder / f"{name}.pub", public)
            self._peers[name] = public

    def delete(self) -> None:
        """Delete the private key: the run is over."""
        self._private = None
        with suppress(FileNotFoundError):
            (self.folder / "own.key").unlink()
            force_to_disk(self.folder)

    def _own(self) -> X25519PrivateKey:
        if self._private is None:
            path = self.folder / "own.key"
            make_private_folder(self.folder)
            with suppress(FileExistsError):
                make_secret_file(path)
            try:
                self._private = X25519PrivateKey.from_private_bytes(read_secret_file(path))
            except (OSError, ValueError) as error:
                remedy = "restore the whole state folder from one backup; a part of it is of no use."
                raise StateError(511, f"{path}: {error}.", remedy) from None
            self._public = self._private.public_key().public_bytes_raw()
        return self._private
