"""In which order the server applies what several sites sent.

strict   a fixed function of (site, seq): the lowest place among all sites' next messages is waited
         for. Sites go through each epoch in proportion to their sizes. Timing cannot show.
fair     among the messages that have arrived, the one whose site is furthest behind its own plan:
         a near, fast site does not drown a far one. Depends on timing, so the engine journals it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from fractions import Fraction

from shared.protocols.stream import UpSequence


class Schedule(ABC):
    """Chooses whose message is next.

    Args:
        sites: all sites of the run, in the order that breaks ties.
    """

    journalled: bool

    def __init__(self, sites: Sequence[str]) -> None:
        self._sites = sites

    @abstractmethod
    def choose(
        self, ready: Set[str], held: Set[str], plans: Mapping[str, UpSequence], applied: Mapping[str, int]
    ) -> str | None:
        """The site whose next message is applied now; None to wait.

        Args:
            ready: sites whose next message is here.
            held: sites that wait for an averaging, and so have no next message.
            plans: what is known of each site's sequence.
            applied: messages applied so far, per site.
        """


class Strict(Schedule):
    """A fixed order; waits for a site that is late."""

    journalled = False

    def choose(
        self, ready: Set[str], held: Set[str], plans: Mapping[str, UpSequence], applied: Mapping[str, int]
    ) -> str | None:
        """See `Schedule.choose`."""
        if len(plans) < len(self._sites):
            return None  # an unknown site's messages could come first
        open_sites = [s for s in self._sites if s not in held and applied[s] < plans[s].last]
        first = min(open_sites, key=lambda site: plans[site].place(applied[site] + 1)[0], default=None)
        return first if first in ready else None


class Fair(Schedule):
    """Weighted round robin over what has arrived; a site's weight is the length of its plan."""

    journalled = True

    def choose(
        self, ready: Set[str], held: Set[str], plans: Mapping[str, UpSequence], applied: Mapping[str, int]
    ) -> str | None:
        """See `Schedule.choose`."""
        candidates = [
            s for s in self._sites if s in ready and s in plans and s not in held and applied[s] < plans[s].last
        ]
        return min(candidates, key=lambda site: Fraction(applied[site] + 1, plans[site].last), default=None)


SCHEDULES: Mapping[str, type[Schedule]] = {"strict": Strict, "fair": Fair}
