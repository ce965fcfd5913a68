"""A broker that loses messages which it has confirmed, as one with a time to live or a purged queue does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from typing_extensions import override

from nightsplit.broker.link_wrapper import LinkWrapper
from nightsplit.shared.transport import Confirmed, Event, Link, Queue
from nightsplit.simulation.broker import MemoryBroker

Place = tuple[str, str, int]
"""Sender, receiver and number of a message in sequence."""


class LosingBroker(MemoryBroker):
    """Loses the first copy of each message at one of these places."""

    def __init__(self, places: Iterable[Place]) -> None:
        super().__init__()
        self.to_lose = set(places)
        self.published: list[Place] = []
        """All messages in sequence in their order, lost ones included."""

    @override
    def link(self, consume: Sequence[Queue], prefetch: int, owner: str) -> Link:
        return _LosingLink(super().link(consume, prefetch, owner), self)


class _LosingLink(LinkWrapper):
    def __init__(self, link: Link, broker: LosingBroker) -> None:
        super().__init__(link)
        self._broker = broker
        self._confirmed: deque[Event] = deque()

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        if (place := place_of(message_id)) is not None:
            self._broker.published.append(place)
        if place in self._broker.to_lose:
            self._broker.to_lose.remove(place)
            self._confirmed.append(Confirmed(message_id))
        else:
            super().publish(queue, message_id, body, headers)

    @override
    def receive(self, timeout: float) -> Event | None:
        return self._confirmed.popleft() if self._confirmed else super().receive(timeout)


def place_of(message_id: str) -> Place | None:
    """The place of a message; None for one without a number, and for a dead letter."""
    parts = message_id.split("/")
    if len(parts) != 5 or parts[0] == "dead" or parts[4] == "0":
        return None
    return parts[1], parts[2], int(parts[4])
