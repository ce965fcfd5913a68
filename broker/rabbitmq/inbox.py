"""Events on their way from the I/O thread of a link to the worker."""

from queue import SimpleQueue

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Event, Unblocked


class Inbox:
    """Events for the worker, and the error that no retry can mend."""

    def __init__(self) -> None:
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        self._failure: BrokerError | None = None
        self._troubles: set[str] = set()

    def fail(self, error: BrokerError) -> None:
        """Let every later call of the worker raise `error`."""
        self._failure = self._failure or error
        self.events.put(None)  # wakes a worker that waits

    def raise_failure(self) -> None:
        """Raise the error, if there is one."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def trouble(self, cause: str, reason: str) -> None:
        """Report a cause of trouble, once until it is over."""
        if cause not in self._troubles:
            self._troubles.add(cause)
            self.events.put(Blocked(reason))

    def over(self, cause: str) -> None:
        """Take a cause back; `Unblocked` follows when it was the last."""
        if cause in self._troubles:
            self._troubles.remove(cause)
            if not self._troubles:
                self.events.put(Unblocked())
