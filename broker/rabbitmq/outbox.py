"""What a link keeps until the broker has confirmed it, and when to offer it again.

Bookkeeping only: no socket, no thread, no clock.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from nightsplit.shared.transport import Queue


class Backoff(Iterator[float]):
    """Seconds to wait before each further attempt: doubling, with a jitter that keeps workers apart."""

    # Not the module's generator: training seeds that one, and its numbers must not depend on us.
    _random = random.Random()

    def __init__(self) -> None:
        self._next = 0.1

    def __next__(self) -> float:
        pause, self._next = self._next, min(2 * self._next, 10.0)
        return pause * self._random.uniform(0.5, 1.0)


@dataclass(slots=True, eq=False)
class OutgoingMessage:
    """A message that the broker has not confirmed."""

    queue: Queue
    message_id: str
    body: bytes
    headers: dict[str, str]
    in_flight: bool = False


@dataclass(slots=True)
class _Held:
    """A queue that refused a message: what it must take before it is trusted again, and its pauses."""

    untaken: set[OutgoingMessage] = field(default_factory=set)
    pauses: Backoff = field(default_factory=Backoff)
    resting: bool = False


class Outbox:
    """Unconfirmed messages in their order, and which of them are under way.

    The broker numbers what one channel publishes 1, 2, 3... and settles the numbers in any order,
    singly and in bulk, accepted and refused mixed: only the set of open numbers tells what a bulk
    answer means.
    """

    def __init__(self) -> None:
        self._messages: dict[OutgoingMessage, None] = {}  # a set that keeps the order
        self._open: dict[int, OutgoingMessage] = {}
        self._last_tag = 0
        self._held: dict[str, _Held] = {}

    def add(self, message: OutgoingMessage) -> None:
        """Take a message in; it stays until it is `taken`."""
        self._messages[message] = None

    def taken(self, message: OutgoingMessage) -> bool:
        """Forget a message that the broker holds now; whether that ends the holding of its queue."""
        del self._messages[message]
        held = self._held.get(message.queue.name)
        if held is None:
            return False
        held.pauses = Backoff()
        held.untaken.discard(message)
        if held.untaken:
            return False
        del self._held[message.queue.name]
        return True

    def sent(self, message: OutgoingMessage) -> None:
        """Note that `message` is under way."""
        self._last_tag += 1
        self._open[self._last_tag] = message
        message.in_flight = True

    @property
    def is_under_way(self) -> bool:
        """Whether the broker has something that it has not settled."""
        return bool(self._open)

    def settle(self, tag: int, multiple: bool) -> list[OutgoingMessage]:
        """Messages that the broker's answer to `tag` is about, oldest first; they are under way no more."""
        if multiple:
            tags = list(takewhile(lambda known: tag == 0 or known <= tag, self._open))  # 0 means all
        else:
            tags = [tag] if tag in self._open else []
        settled = [self._open.pop(known) for known in tags]
        for message in settled:
            message.in_flight = False
        return settled

    def recall(self) -> None:
        """Nothing is under way any more: the channel is gone, and its numbers with it."""
        self.settle(0, multiple=True)
        self._last_tag = 0

    def due(self) -> list[OutgoingMessage]:
        """Messages to send now, oldest first: of a held queue at most the oldest, and after a pause."""
        found, seen = [], set()
        for message in self._messages:
            name = message.queue.name
            held = self._held.get(name)
            if not message.in_flight and (held is None or (name not in seen and not held.resting)):
                found.append(message)
            seen.add(name)
        return found

    def is_held(self, queue: Queue) -> bool:
        """Whether `queue` refused something, and has not yet taken all that it held up."""
        return queue.name in self._held

    def hold(self, queue: Queue) -> float | None:
        """Offer `queue` nothing for the seconds returned (None when it rests already), then one at a time."""
        held = self._held.setdefault(queue.name, _Held())
        held.untaken.update(message for message in self._messages if message.queue.name == queue.name)
        if held.resting:
            return None
        held.resting = True
        return next(held.pauses)

    def wake(self, queue: Queue) -> None:
        """End the rest of `queue`."""
        if queue.name in self._held:
            self._held[queue.name].resting = False
