"""How long the open round of a run has been open, and whether it has been long enough."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from nightsplit.shared.run_store.status import Round


class Deadline:
    """Of a round that has its quorum. The clock is this server's own, and goes on while no server is there.

    Args:
        hours: from the beginning of a round.
        told: the round that was open at the server before this one.
        now: the present moment.
    """

    def __init__(self, hours: float, told: Round, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._hours = timedelta(hours=hours)
        self._now = now
        self._number, self._opened = told.number, told.opened or now()

    def look(self, version: int) -> None:
        """Take note of how often the server has combined; another number means another round."""
        if version != self._number:
            self._number, self._opened = version, self._now()

    @property
    def is_over(self) -> bool:
        """Whether the round has been open for long enough."""
        return self._now() - self._opened >= self._hours

    @property
    def round(self) -> Round:
        """The open round: what `status` shows, and the next server goes on with."""
        return Round(number=self._number, opened=self._opened)
