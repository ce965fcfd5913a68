"""Clock of the workers, which tests replace to run three nights in seconds."""

import time
from abc import ABC, abstractmethod
from datetime import UTC, datetime

from typing_extensions import override


class Clock(ABC):
    """Source of time. It decides when work is done, but has no effect on training."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the present moment, with time zone UTC."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Wait for this time."""


class SystemClock(Clock):
    """Clock of the machine."""

    @override
    def now(self) -> datetime:
        return datetime.now(UTC)

    @override
    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
