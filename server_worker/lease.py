"""The lease of the active server: one server per run, and a fence that grows with every take-over."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from nightsplit.shared.errors import StateError
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.storage.checkpoint import Pointer

TTL_SECONDS = 15.0


def owner_of(folder: Path, alone: bool) -> str:
    """A server's name for its lease.

    The holder of a folder's lock keeps one name: whoever had that name before is dead, so it need
    not be waited for. A standby beside it goes by another name, and waits until the lease runs out.
    """
    name = f"{socket.gethostname()}:{folder.resolve()}"
    return name if alone else f"{name}:{os.getpid()}"


class Lease:
    """The right to act as the run's server; what `nightsplit.shared.engine.fencing.CheckpointAuthority` asks for.

    Args:
        store: used from the worker's thread.
        owner: names this server (`owner_of`); a restart under the same name takes over at once.
    """

    def __init__(self, store: RunStore, owner: str) -> None:
        self._store = store
        self._owner = owner
        self.fence = 0
        self._lost = False
        self._renewed = 0.0

    def acquire(self, wait: Callable[[float], bool]) -> bool:
        """Become the active server, waiting while another one is.

        Args:
            wait: sleeps for so many seconds; False to give up.

        Returns:
            Whether this server is active now.
        """
        while (fence := self._store.acquire_lease(self._owner, TTL_SECONDS)) is None:
            if not wait(TTL_SECONDS / 5):
                return False
        self.fence = fence
        self._renewed = time.monotonic()
        return True

    def renew(self, store: RunStore) -> None:
        """Stay active. Called by the heartbeat, with the heartbeat's own connection."""
        asked = time.monotonic()
        if store.renew_lease(self._owner, self.fence, TTL_SECONDS):
            self._renewed = asked
        else:
            self._lost = True

    def check(self) -> None:
        """Stop a server that was replaced, perhaps while it slept: nothing may be done on an old lease.

        Raises:
            StateError: 505 another server took over.
            BrokerError: 207 the lease is old and the store cannot be asked.
        """
        if time.monotonic() - self._renewed > TTL_SECONDS:
            self.renew(self._store)
        if self._lost:
            what = f"a server with a higher fence than {self.fence} is active."
            raise StateError(505, what, "nothing is lost; stop one of them.")

    def release(self) -> None:
        """Stop being the active server."""
        self._store.release_lease(self._owner, self.fence)

    def pointer(self) -> Pointer | None:
        """See `Authority`."""
        return self._store.pointer()

    def move_pointer(self, pointer: Pointer) -> bool:
        """See `Authority`."""
        return self._store.move_pointer(pointer)

    def journal(self, position: int, sender: str) -> str:
        """See `Authority`."""
        return self._store.journal(position, sender)

    def journalled(self, position: int) -> str | None:
        """See `Authority`."""
        return self._store.journalled(position)
