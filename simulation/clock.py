"""Clock that a test or a simulation moves by hand."""

from datetime import UTC, datetime, timedelta

from typing_extensions import override

from nightsplit.shared.clock import Clock


class ManualClock(Clock):
    """Clock that moves only by `advance` and `sleep`."""

    def __init__(self, start: datetime) -> None:
        self._now = start.astimezone(UTC)

    @override
    def now(self) -> datetime:
        return self._now

    @override
    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move time forward."""
        self._now += timedelta(seconds=seconds)
