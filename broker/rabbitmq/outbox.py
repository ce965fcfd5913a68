"""Unconfirmed messages of a link, and the times to publish them again.

Bookkeeping only: no socket, no thread, no clock.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from nightsplit.shared.transport import Queue

# Not the module's generator: training seeds that one, and its numbers must not depend on retries.
_random = random.Random()


def backoff() -> Iterator[float]:
    """Yield the seconds before each further attempt: doubling, with a jitter that keeps workers apart."""
    delay = 0.1
    while True:
        yield delay * _random.uniform(0.5, 1.0)
        delay = min(2 * delay, 10.0)


@dataclass(slots=True, eq=False)
class OutgoingMessage:
    """Message that the broker has not confirmed."""

    queue: Queue
    message_id: str
    body: bytes
    headers: dict[str, str]
    in_flight: bool = False


@dataclass(slots=True)
class _Hold:
    """Hold of a queue that refused a message: the messages it must accept before the hold ends, and the delays."""

    unconfirmed: set[OutgoingMessage] = field(default_factory=set)
    pauses: Iterator[float] = field(default_factory=backoff)
    is_paused: bool = False


class Outbox:
    """Unconfirmed messages in their order, with those that are in flight.

    The delivery tags of a channel are 1, 2, 3... and the broker settles them in any order, singly and
    in bulk, accepted and refused mixed: only the set of open tags gives the meaning of a bulk reply.
    """

    def __init__(self) -> None:
        self._messages: dict[OutgoingMessage, None] = {}  # a set that keeps the order
        self._in_flight: dict[int, OutgoingMessage] = {}
        self._last_tag = 0
        self._holds: dict[str, _Hold] = {}

    def add(self, message: OutgoingMessage) -> None:
        """Add a message, which stays until it is confirmed."""
        self._messages[message] = None

    def confirm(self, message: OutgoingMessage) -> bool:
        """Remove a confirmed message; return whether that ends the hold of its queue."""
        del self._messages[message]
        hold = self._holds.get(message.queue.name)
        if hold is None:
            return False
        hold.pauses = backoff()
        hold.unconfirmed.discard(message)
        if hold.unconfirmed:
            return False
        del self._holds[message.queue.name]
        return True

    def mark_sent(self, message: OutgoingMessage) -> None:
        """Mark `message` as in flight."""
        self._last_tag += 1
        self._in_flight[self._last_tag] = message
        message.in_flight = True

    @property
    def has_in_flight(self) -> bool:
        """True while a reply of the broker is outstanding."""
        return bool(self._in_flight)

    def settle(self, tag: int, multiple: bool) -> list[OutgoingMessage]:
        """Take the messages that the broker's reply to `tag` covers out of flight; return them, oldest first."""
        if multiple:
            tags = list(takewhile(lambda open_tag: tag == 0 or open_tag <= tag, self._in_flight))  # 0 means all
        else:
            tags = [tag] if tag in self._in_flight else []
        settled = [self._in_flight.pop(open_tag) for open_tag in tags]
        for message in settled:
            message.in_flight = False
        return settled

    def reset(self) -> None:
        """Take all messages out of flight: the channel is lost, and its tags with it."""
        self.settle(0, multiple=True)
        self._last_tag = 0

    def due(self) -> list[OutgoingMessage]:
        """Return the messages to send now, oldest first: of a held queue only the oldest, and not in its pause."""
        due, seen = [], set()
        for message in self._messages:
            name = message.queue.name
            hold = self._holds.get(name)
            if not message.in_flight and (hold is None or (name not in seen and not hold.is_paused)):
                due.append(message)
            seen.add(name)
        return due

    def is_held(self, queue: Queue) -> bool:
        """Return whether `queue` refused a message, and has not yet accepted all that have waited since."""
        return queue.name in self._holds

    def hold(self, queue: Queue) -> float | None:
        """Pause `queue` for the seconds returned (None when it is paused already), then send one message at a time."""
        hold = self._holds.setdefault(queue.name, _Hold())
        hold.unconfirmed.update(message for message in self._messages if message.queue.name == queue.name)
        if hold.is_paused:
            return None
        hold.is_paused = True
        return next(hold.pauses)

    def resume(self, queue: Queue) -> None:
        """End the pause of `queue`."""
        if queue.name in self._holds:
            self._holds[queue.name].is_paused = False
