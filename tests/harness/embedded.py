"""Messages 0, 1, 2... in the embedded broker: stored, taken, counted."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.shared.transport import Confirmed, Delivery, Link, Queue

DEAD = Queue("night.north.dead", "night.north", "dead", None, None)
UP = Queue("night.north.up", "night.north", "up", None, DEAD)
LARGE = 200_000


def body(number: int) -> bytes:
    """Small and large in turn, so that a half written one could not go unnoticed."""
    return random.Random(number).randbytes(LARGE if number % 3 == 2 else 1000)


def take(link: Link, count: int) -> list[Delivery]:
    """The next `count` deliveries; nothing else may happen."""
    taken: list[Delivery] = []
    while len(taken) < count:
        event = link.receive(20)
        assert isinstance(event, Delivery), event
        taken.append(event)
    return taken


def store(broker: EmbeddedBroker, count: int) -> None:
    """Publish messages 0, 1, 2... and wait for their confirms."""
    with broker.link([], 8, "publisher") as link:
        for number in range(count):
            link.publish(UP, str(number), [body(number)])
        for number in range(count):
            assert link.receive(20) == Confirmed(str(number))


def ids(deliveries: list[Delivery]) -> list[int]:
    return [int(delivery.message_id) for delivery in deliveries]


def rows(folder: Path) -> int:
    """Messages on disk, acknowledged by nobody."""
    with closing(sqlite3.connect(folder / "broker.sqlite")) as database:
        count: int = database.execute("SELECT count(*) FROM message").fetchone()[0]
        return count


def files(folder: Path) -> int:
    return sum(1 for _ in (folder / "bodies").iterdir())
