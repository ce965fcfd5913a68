"""Time as the workers see it, so that tests can run three nights in seconds."""

import time
from abc import ABC, abstractmethod
from datetime import UTC, datetime


class Clock(ABC):
    """A source of time. Nothing about training depends on it, only when work is done."""

    @abstractmethod
    def now(self) -> datetime:
        """The present moment, with time zone UTC."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Wait."""


class SystemClock(Clock):
    """The machine's own clock."""

    def now(self) -> datetime:
        """See `Clock`."""
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        time.sleep(seconds)
