"""Pauses after which a worker that waits for messages does something about it."""

from collections.abc import Callable

PAUSE_S_MIN = 60.0
PAUSE_S_MAX = 3600.0


class Patience:
    """Patience of a worker without work: a minute, then twice as long each time, up to an hour.

    `monotonic` returns the present time in seconds.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._since: float | None = None
        self._pause = PAUSE_S_MIN

    def is_over(self, worked: bool) -> bool:
        """Return whether the present pause is over, and begin the next one; after work the first one begins."""
        now = self._monotonic()
        if worked or self._since is None:
            self._since, self._pause = now, PAUSE_S_MIN
        if now - self._since < self._pause:
            return False
        self._since, self._pause = now, min(2 * self._pause, PAUSE_S_MAX)
        return True
