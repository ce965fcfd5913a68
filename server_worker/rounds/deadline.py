"""How long the open round of a run has been open, and whether it has been long enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from nightsplit.shared.wire.message import Scalar


class Deadline:
    """Of a round that has its quorum. The clock is this server's own, and goes on while no server is there.

    Args:
        hours: from the beginning of a round.
        told: facts of this run's server before this one.
        now: the present moment.
    """

    def __init__(
        self,
        hours: float,
        told: Mapping[str, Scalar | None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._hours = timedelta(hours=hours)
        self._now = now
        self._round = int(told.get("round") or 0)
        self._opened = datetime.fromisoformat(str(opened)) if (opened := told.get("round_opened")) else now()

    def look(self, version: int) -> None:
        """Take note of how often the server has combined; another number means another round."""
        if version != self._round:
            self._round, self._opened = version, self._now()

    @property
    def is_over(self) -> bool:
        """Whether the round has been open for long enough."""
        return self._now() - self._opened >= self._hours

    def facts(self) -> dict[str, Scalar | None]:
        """What `status` shows, and the next server goes on with."""
        return {"round": self._round, "round_opened": self._opened.isoformat(timespec="seconds")}
