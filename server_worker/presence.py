"""Silence of sites, and the rule by which a run goes on without one.

A site is present when one of its messages is applied, or when its heartbeat in the run store changes.
Its silence is the time since then in which the run waited for it and this server listened, on
the server's own monotonic clock: hours in which the run waited for others, or the server was away,
asleep, or cut off from the broker or the run store do not count, and no clock of another host is
ever read. A new server continues the silence that the last one recorded.

This is only the rule; the decision is an entry of the order journal (`nightsplit.shared.engine.order`).
"""

import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime

from msgspec.structs import replace

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.run_store.base import Status
from nightsplit.shared.run_store.status import Presence, SiteStatus

UPDATE_INTERVAL_S_MAX = 60.0
"""Longest time in seconds between two updates that counts; a server that slept for longer did not listen."""
UPDATE_INTERVAL_S_MIN = 1.0
"""Shortest time in seconds between two updates, since each one goes over all sites."""
LISTENING_S_MIN = 600.0
"""Seconds that a server listens itself before it excludes a site, whatever silence the last server recorded."""


class SilenceTracker:
    """Tracker of the silence of each site, which continues from `previous`, the last server's record.

    `monotonic` returns seconds on this server's clock; the current time, `now`, is only for display.
    """

    def __init__(
        self, config: RunConfig, previous: Mapping[str, SiteStatus], monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        run = config.run
        self._quorum = run.quorum if run.quorum is not None else len(run.sites)
        self._limit = run.absence_hours * 3600.0
        self._monotonic, self._now = monotonic, now
        self._updated = monotonic()
        inherited_max = self._limit - min(LISTENING_S_MIN, self._limit / 2)
        self.sites: dict[str, Presence] = {}
        """Presence of each site, shown by `status` and continued by the next server."""
        for site in run.sites:
            presence = previous.get(site, SiteStatus()).presence
            self.sites[site] = replace(presence, silent_seconds=min(inherited_max, presence.silent_seconds))
        self._applied: dict[str, int] = {}
        """Messages of each site at the last update; empty before the first."""

    @property
    def last_seen(self) -> dict[str, datetime | None]:
        """Time at which each site was last present; None for never."""
        return {site: presence.last_seen for site, presence in self.sites.items()}

    @property
    def is_due(self) -> bool:
        """True when it is time for the next update."""
        return self._monotonic() - self._updated >= UPDATE_INTERVAL_S_MIN

    def update(
        self, applied: Mapping[str, int], awaited: Collection[str], statuses: Mapping[str, Status], listening: bool
    ) -> None:
        """Update every site's presence; to be called when it `is_due`.

        `applied` are the messages applied, `awaited` the sites that the run waits for, and `listening` is whether
        broker and run store can be reached.
        """
        now = self._monotonic()
        elapsed = min(max(0.0, now - self._updated), UPDATE_INTERVAL_S_MAX) if listening else 0.0
        self._updated = now
        for site, last in self.sites.items():
            beat = statuses[site].report.beat if site in statuses else None
            has_new_beat = beat is not None and beat != last.beat
            has_new_message = site in self._applied and applied[site] > self._applied[site]
            if has_new_beat or has_new_message:
                self.sites[site] = Presence(beat=beat or last.beat, last_seen=self._now().replace(microsecond=0))
            elif site in awaited:
                self.sites[site] = replace(last, silent_seconds=last.silent_seconds + elapsed)
        self._applied = dict(applied)

    def overdue(self, awaited: Collection[str], active_sites: Collection[str]) -> str | None:
        """Return an awaited site that a run of the active sites should go on without; None to wait."""
        silent = self._silent(awaited)
        return silent[0] if silent and self._has_quorum(active_sites, silent) else None

    def lacking(self, awaited: Collection[str], active_sites: Collection[str]) -> list[str]:
        """Return the silent sites that the run waits for, since it has no quorum without them."""
        silent = self._silent(awaited)
        return [] if self._has_quorum(active_sites, silent) else silent

    def _silent(self, awaited: Collection[str]) -> list[str]:
        return [site for site in awaited if self.sites[site].silent_seconds >= self._limit]

    def _has_quorum(self, active_sites: Collection[str], silent: Collection[str]) -> bool:
        return len(active_sites) - len(silent) >= self._quorum
