"""Queue of events from a link's I/O thread to the worker."""

from queue import SimpleQueue

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Event, Unblocked


class Inbox:
    """Thread-safe queue of events for the worker, with the permanent error that ends them."""

    def __init__(self) -> None:
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        self._failure: BrokerError | None = None
        self._causes: set[str] = set()

    def fail(self, error: BrokerError) -> None:
        """Make every later call of the worker raise `error`."""
        self._failure = self._failure or error
        self.events.put(None)  # wakes a waiting worker

    def raise_failure(self) -> None:
        """Raise the error, if there is one."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def block(self, cause: str, reason: str) -> None:
        """Report that a cause blocks the link, once until it is over."""
        if cause not in self._causes:
            self._causes.add(cause)
            self.events.put(Blocked(reason))

    def unblock(self, cause: str) -> None:
        """Report that a cause is over; `Unblocked` follows when it was the last."""
        if cause in self._causes:
            self._causes.remove(cause)
            if not self._causes:
                self.events.put(Unblocked())
