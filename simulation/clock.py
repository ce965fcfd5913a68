"""A clock that a test or a simulation moves by hand."""

from datetime import UTC, datetime, timedelta

from nightsplit.shared.clock import Clock


class ManualClock(Clock):
    """A clock that moves only when told to, or when somebody sleeps."""

    def __init__(self, start: datetime) -> None:
        self._now = start.astimezone(UTC)

    def now(self) -> datetime:
        """See `Clock`."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move time forward."""
        self._now += timedelta(seconds=seconds)
