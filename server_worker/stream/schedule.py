"""Schedules, the order in which the server applies messages of several sites.

strict   a fixed function of (site, seq): the server waits for the lowest place among all sites' next
         messages. Sites go through each epoch in proportion to their sizes. Timing has no influence.
fair     among the messages that have arrived, the one from the site furthest behind its own plan:
         a near, fast site does not displace a far one. It depends on timing, so the engine journals it.

An excluded site is not in `applied`: no schedule waits for it, or chooses it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set

from typing_extensions import override

from nightsplit.shared.protocols.stream import StreamSequence


class Schedule(ABC):
    """Order of the sites' messages.

    Args:
        sites: all sites of the run, in the order that breaks ties.
    """

    journalled: bool

    def __init__(self, sites: Sequence[str]) -> None:
        self._sites = sites

    @abstractmethod
    def awaited(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        """Return the sites that would be next if only their message were here.

        Args:
            held: sites that wait for an averaging, and so have no next message.
            plans: sequence of each site that has said hello.
            applied: messages applied so far, per active site.
        """

    def choose(
        self, ready: Set[str], held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]
    ) -> str | None:
        """Return the site that is next, of several the one furthest behind its plan; None to wait.

        Args:
            ready: sites with their next message here.
            Others as in `awaited`.
        """
        candidates = [site for site in self.awaited(held, plans, applied) if site in ready and site in plans]
        # Quotients of integers below 2^26 are equal as floats only if they are equal.
        return min(candidates, key=lambda site: (applied[site] + 1) / plans[site].last, default=None)

    def _unfinished(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        """Return the sites that may have more to send and do not wait for an averaging."""
        return [
            site for site in self._sites
            if site in applied and site not in held and (site not in plans or applied[site] < plans[site].last)
        ]  # fmt: skip


class Strict(Schedule):
    """Fixed order, which waits for a late site."""

    journalled = False

    @override
    def awaited(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        # One site, once the sequences of all are known.
        unfinished = self._unfinished(held, plans, applied)
        if unknown := [site for site in unfinished if site not in plans]:
            return unknown  # their messages could come first
        return sorted(unfinished, key=lambda site: plans[site].place(applied[site] + 1))[:1]


class Fair(Schedule):
    """Weighted round robin over the messages that have arrived; a site's weight is the length of its plan."""

    journalled = True

    @override
    def awaited(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        return self._unfinished(held, plans, applied)


SCHEDULES: Mapping[str, type[Schedule]] = {"strict": Strict, "fair": Fair}
