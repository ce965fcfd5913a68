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

    The process that holds the folder's lock always has the same name. It can hold the lock only when its
    predecessor is dead, so it takes over that lease at once. A standby, without the lock, adds its process id:
    to the store it is another owner, which waits until the lease expires.
    """
    name = f"{socket.gethostname()}:{folder.resolve()}"
    return name if locked else f"{name}:{os.getpid()}"


class Lease(CheckpointAuthority):
    """Right to act as the run's server; `store` is used from the worker's thread, `owner` is from `lease_owner`."""

    fence = 0

    def __init__(self, store: RunStore, owner: str) -> None:
        self._store = store
        self._owner = owner
        self._lost = False
        self._renewed = 0.0

    def acquire(self, wait: Callable[[float], bool]) -> bool:
        """Become the active server, waiting while another one is active; return whether it has become so.

        `wait` sleeps for the given seconds, and returns False to give up.
        """
        while (fence := self._store.acquire_lease(self._owner, TTL_SECONDS)) is None:
            if not wait(TTL_SECONDS / 5):
                return False
        self.fence, self._renewed, self._lost = fence, time.monotonic(), False
        return True

    def renew(self, store: RunStore) -> None:
        """Renew the lease. Called by the heartbeat, with the heartbeat's own connection."""
        now = time.monotonic()  # before the call: our own time must run out before the store's
        if store.renew_lease(self._owner, self.fence, TTL_SECONDS):
            self._renewed = now
        else:
            self._lost = True

    def check(self) -> None:
        """Check that no other server has taken over, for example while this host was suspended.

        StateError 505 if one has; BrokerError 207 if the lease has expired and the store cannot be reached.
        """
        if time.monotonic() - self._renewed > TTL_SECONDS:
            self.renew(self._store)
        if self._lost:
            remedy = "nothing is lost; stop this server, or the other one."
            raise StateError(505, f"another server with a higher fence than {self.fence} is active.", remedy)

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
    def claim_position(self, position: int, entry: str) -> str:
        return self._store.claim_position(position, entry)

    @override
    def journal_entry(self, position: int) -> str | None:
        return self._store.journal_entry(position)
