"""Time as the workers see it, so that tests can run three nights in seconds."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from datetime import UTC, datetime, timedelta


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
