"""Which sites have fallen silent, and the rule by which a run goes on without one.

A site is heard when a message of it is applied, or when its heartbeat in the run store says something
new. Its silence is the time since then in which the run waited for it and this server listened, on
the server's own monotonic clock: hours in which the run waited for others, or the server was away,
asleep, or cut off from the broker or the run store do not count, and no clock of another machine is
ever read. Silence goes on where the last server left off.

This is the rule and not the decision: that is an entry of the order journal (`nightsplit.shared.engine.order`).
"""

import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime

from msgspec.structs import replace

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.run_store.base import Status
from nightsplit.shared.run_store.status import Presence, SiteStatus

LONGEST_LOOK = 60.0
"""Seconds between two looks that count; a server that slept for longer did not listen."""
SHORTEST_LOOK = 1.0
"""Seconds between two looks: each one goes over all sites, and between two steps nothing has changed."""
LISTENED_FIRST = 600.0
"""Seconds that a server listens itself before it leaves a site out, whatever it was told of the time before."""


class SilenceTracker:
    """Keeps the silence of each site.

    Args:
        config: the run: its sites, quorum and absence_hours.
        before: what the last server told of each site.
        monotonic: seconds on this server's clock.
        now: the present moment, for people to read; nothing is decided by it.

    Attributes:
        sites: presence of each site: what `status` shows, and the next server goes on with.
    """

    def __init__(
        self,
        config: RunConfig,
        before: Mapping[str, SiteStatus],
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        run = config.run
        self._quorum = run.quorum if run.quorum is not None else len(run.sites)
        self._limit = run.absence_hours * 3600.0
        self._monotonic, self._now = monotonic, now
        self._looked = monotonic()
        most = self._limit - min(LISTENED_FIRST, self._limit / 2)
        self.sites: dict[str, Presence] = {}
        for site in run.sites:
            told = before.get(site, SiteStatus()).presence
            self.sites[site] = replace(told, silent_seconds=min(most, told.silent_seconds))
        self._applied: dict[str, int] = {}
        """Messages of each site at the last look; empty before the first."""

    @property
    def last_seen(self) -> dict[str, datetime | None]:
        """When each site was heard last; None for never."""
        return {site: presence.last_seen for site, presence in self.sites.items()}

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next look."""
        return self._monotonic() - self._looked >= SHORTEST_LOOK

    def look(
        self, applied: Mapping[str, int], awaited: Collection[str], statuses: Mapping[str, Status], listening: bool
    ) -> None:
        """Take note of the time, and of every site's signs of life; to be called when it `is_due`.

        Args:
            applied: messages applied, per site.
            awaited: sites that the run waits for.
            statuses: what the run store last knew.
            listening: whether broker and run store can be reached.
        """
        now = self._monotonic()
        passed = min(max(0.0, now - self._looked), LONGEST_LOOK) if listening else 0.0
        self._looked = now
        for site, known in self.sites.items():
            beat = statuses[site].report.beat if site in statuses else None
            if beat not in (None, known.beat) or applied[site] > self._applied.get(site, applied[site]):
                self.sites[site] = Presence(beat=beat or known.beat, last_seen=self._now().replace(microsecond=0))
            elif site in awaited:
                self.sites[site] = replace(known, silent_seconds=known.silent_seconds + passed)
        self._applied = dict(applied)

    def overdue(self, awaited: Collection[str], active_sites: Collection[str]) -> str | None:
        """The awaited site that the run, in which the active sites take part, should go on without; None to wait."""
        silent = self._too_long(awaited)
        return silent[0] if silent and self._suffice(active_sites, silent) else None

    def lacking(self, awaited: Collection[str], active_sites: Collection[str]) -> list[str]:
        """Silent sites without which the quorum is not met, so that the run waits; arguments as in `overdue`."""
        silent = self._too_long(awaited)
        return [] if self._suffice(active_sites, silent) else silent

    def _too_long(self, awaited: Collection[str]) -> list[str]:
        return [site for site in awaited if self.sites[site].silent_seconds >= self._limit]

    def _suffice(self, active_sites: Collection[str], silent: Collection[str]) -> bool:
        return len(active_sites) - len(silent) >= self._quorum
