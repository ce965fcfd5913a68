"""In which order the server applies what several sites sent.

strict   a fixed function of (site, seq): the lowest place among all sites' next messages is waited
         for. Sites go through each epoch in proportion to their sizes. Timing cannot show.
fair     among the messages that have arrived, the one whose site is furthest behind its own plan:
         a near, fast site does not drown a far one. Depends on timing, so the engine journals it.

A site that was left out is not among `applied`: no schedule waits for it, or chooses it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set

from nightsplit.shared.protocols.stream import StreamSequence


class Schedule(ABC):
    """Chooses whose message is next.

    Args:
        sites: all sites of the run, in the order that breaks ties.
    """

    journalled: bool

    def __init__(self, sites: Sequence[str]) -> None:
        self._sites = sites

    @abstractmethod
    def awaited(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        """Sites whose next message would be applied now, were it the only one here.

        Args:
            held: sites that wait for an averaging, and so have no next message.
            plans: what is known of each site's sequence.
            applied: messages applied so far, per site that takes part.
        """

    def choose(
        self, ready: Set[str], held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]
    ) -> str | None:
        """The site whose next message is applied now, of several the one furthest behind its plan; None to wait.

        Args:
            ready: sites whose next message is here.
            Others as in `awaited`.
        """
        candidates = [site for site in self.awaited(held, plans, applied) if site in ready and site in plans]
        # Quotients of whole numbers below 2^26 are equal as floats only where they are equal.
        return min(candidates, key=lambda site: (applied[site] + 1) / plans[site].last, default=None)

    def _open(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        """Sites that have more to send, as far as is known, and do not wait for an averaging."""
        return [
            site for site in self._sites
            if site in applied and site not in held and (site not in plans or applied[site] < plans[site].last)
        ]  # fmt: skip


class Strict(Schedule):
    """A fixed order; waits for a site that is late."""

    journalled = False

    def awaited(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        """See `Schedule.awaited`: one site, once all are known."""
        open_sites = self._open(held, plans, applied)
        if unknown := [site for site in open_sites if site not in plans]:
            return unknown  # their messages could come first
        return sorted(open_sites, key=lambda site: plans[site].place(applied[site] + 1))[:1]


class Fair(Schedule):
    """Weighted round robin over what has arrived; a site's weight is the length of its plan."""

    journalled = True

    def awaited(self, held: Set[str], plans: Mapping[str, StreamSequence], applied: Mapping[str, int]) -> list[str]:
        """See `Schedule.awaited`: every site that has more to send."""
        return self._open(held, plans, applied)


SCHEDULES: Mapping[str, type[Schedule]] = {"strict": Strict, "fair": Fair}
