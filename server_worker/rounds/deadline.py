"""Deadline of the open round."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from nightsplit.shared.run_store.status import Round


class Deadline:
    """Deadline of a round that has its quorum, on this server's clock. It runs on while no server is active.

    Args:
        hours: time from the beginning of a round.
        previous: the round that was open at the last server.
        now: the current time.
    """

    def __init__(self, hours: float, previous: Round, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._hours = timedelta(hours=hours)
        self._now = now
        self._number, self._opened = previous.number, previous.opened or now()

    def update(self, version: int) -> None:
        """Start a new round when the server has combined updates, which changes the version."""
        if version != self._number:
            self._number, self._opened = version, self._now()

    @property
    def is_over(self) -> bool:
        """True when the round has been open for so long."""
        return self._now() - self._opened >= self._hours

    @property
    def round(self) -> Round:
        """Open round, shown by `status` and continued by the next server."""
        return Round(number=self._number, opened=self._opened)
