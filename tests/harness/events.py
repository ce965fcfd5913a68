"""Events of a link, as tests await them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from nightsplit.shared.transport import Blocked, Broker, Confirmed, Delivery, Event, Link, Queue

PATIENCE_S = 10.0
LIMIT = 2**20
"""Bytes of a queue."""


def collect(link: Link, done: Callable[[list[Event]], bool], patience: float = PATIENCE_S) -> list[Event]:
    """Events until `done`, which gets those so far; fails when they do not come."""
    events: list[Event] = []
    deadline = time.monotonic() + patience
    while not done(events):
        assert time.monotonic() < deadline, f"still waiting, with {[type(event).__name__ for event in events]}"
        event = link.receive(0.2)
        if event is not None:
            events.append(event)
    return events


def deliveries(link: Link, count: int) -> list[Delivery]:
    """The next `count` deliveries; nothing else may arrive between them."""
    events = collect(link, lambda events: len(events) == count)
    assert all(isinstance(event, Delivery) for event in events), events
    return [event for event in events if isinstance(event, Delivery)]


def quiet(link: Link, seconds: float = 0.4) -> bool:
    return link.receive(seconds) is None


def publish_all(broker: Broker, queue: Queue, ids: list[str], body: bytes = b"body") -> None:
    """Publish from a link of its own, and wait for every confirm."""
    with broker.link([], 1, "publisher") as link:
        for message_id in ids:
            link.publish(queue, message_id, [body])
        collect(link, lambda events: confirmed(events) >= set(ids))
        assert link.unconfirmed == frozenset()


def fill(link: Link, queue: Queue, size: int) -> list[Event]:
    """Publish m0, m1... one after another until one is refused: together they may exceed the limit. The events."""
    events: list[Event] = []
    for name in names(20):
        link.publish(queue, name, [bytes(size)])
        events += collect(link, lambda found: len(found) == 1)
        if isinstance(events[-1], Blocked):
            return events
    raise AssertionError("the queue has no limit")


def confirmed(events: list[Event]) -> set[str]:
    return {event.message_id for event in events if isinstance(event, Confirmed)}


def ids(events: Sequence[Event]) -> list[str]:
    return [event.message_id for event in events if isinstance(event, Delivery)]


def names(count: int) -> list[str]:
    return [f"m{number}" for number in range(count)]
