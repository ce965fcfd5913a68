"""Lease of the active server: one server per run, and a fence that grows with every takeover."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from typing_extensions import override

from nightsplit.shared.engine.fencing import CheckpointAuthority
from nightsplit.shared.errors import StateError
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.storage.checkpoint import Pointer

TTL_SECONDS = 15.0


def lease_owner(folder: Path, locked: bool) -> str:
    """Return the name of a server for its lease.

    The process that has locked the folder keeps one name: the last process of that name is dead, so
    its lease is taken over at once. A standby has another name, and waits until the lease expires.
    """
    name = f"{socket.gethostname()}:{folder.resolve()}"
    return name if locked else f"{name}:{os.getpid()}"


class Lease(CheckpointAuthority):
    """Right to act as the run's server.

    Args:
        store: used from the worker's thread.
        owner: name of this server (`lease_owner`); a restart under the same name takes over at once.
    """

    fence = 0

    def __init__(self, store: RunStore, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._lost = False
        self._renewed = 0.0

    def acquire(self, wait: Callable[[float], bool]) -> bool:
        """Become the active server, waiting while another one is active.

        Args:
            wait: sleeps for the given seconds; returns False to give up.

        Returns:
            True when this server is active.
        """
        while (fence := self._store.acquire_lease(self._owner, TTL_SECONDS)) is None:
            if not wait(TTL_SECONDS / 5):
                return False
        self.fence = fence
        self._renewed = time.monotonic()
        return True

    def renew(self, store: RunStore) -> None:
        """Renew the lease. Called by the heartbeat, with the heartbeat's own connection."""
        now = time.monotonic()
        if store.renew_lease(self._owner, self.fence, TTL_SECONDS):
            self._renewed = now
        else:
            self._lost = True

    def check(self) -> None:
        """Check that this server is still active; it may have been replaced while it slept.

        Raises:
            StateError: 505 another server took over.
            BrokerError: 207 the lease has expired and the store cannot be reached.
        """
        if time.monotonic() - self._renewed > TTL_SECONDS:
            self.renew(self._store)
        if self._lost:
            sentence = f"a server with a higher fence than {self.fence} is active."
            raise StateError(505, sentence, "nothing is lost; stop one of them.")

    def release(self) -> None:
        """Stop being the active server."""
        self._store.release_lease(self._owner, self.fence)

    @override
    def pointer(self) -> Pointer | None:
        return self._store.pointer()

    @override
    def move_pointer(self, pointer: Pointer) -> bool:
        return self._store.move_pointer(pointer)

    @override
    def journal(self, position: int, sender: str) -> str:
        return self._store.journal(position, sender)

    @override
    def journalled(self, position: int) -> str | None:
        return self._store.journalled(position)
