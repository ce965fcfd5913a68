"""Broker in memory, for one process. The content of its queues can be read, dead letters included."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from typing_extensions import override

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Broker, Confirmed, Delivery, Event, Link, Queue, Unblocked, check_size


@dataclass(eq=False, slots=True)
class _StoredQueue:
    """Queue with its content: messages that wait, messages handed out, and the link that consumes them."""

    queue: Queue
    waiting: deque[Delivery] = field(default_factory=deque)
    handed_out: list[Delivery] = field(default_factory=list)
    consumer: _MemoryLink | None = None


class MemoryBroker(Broker):
    """Broker with queues in this process. Messages outlive links, not the process."""

    def __init__(self, max_message_bytes: int = 16 * 2**20) -> None:
        self._max_message_bytes = max_message_bytes
        self._queues: dict[str, _StoredQueue] = {}
        self._tags = 0
        self._changed = threading.Condition()

    @override
    def declare(self, queues: Iterable[Queue]) -> None:
        with self._changed:
            for queue in queues:
                known = self._queues.setdefault(queue.name, _StoredQueue(queue))
                if known.queue != queue:
                    sentence = f"queue {queue.name} exists with {known.queue}, and this run needs {queue}."
                    raise BrokerError(204, sentence, "use the run's original limits, or another run id.")

    @override
    def link(self, consume: Sequence[Queue], prefetch: int, owner: str) -> Link:
        for queue in consume:
            self._stored(queue)
        return _MemoryLink(self, consume, prefetch)

    @override
    def depth(self, queue: Queue) -> int | None:
        with self._changed:
            stored = self._queues.get(queue.name)
            return None if stored is None else len(stored.waiting)

    @override
    def is_consumed(self, queue: Queue) -> bool:
        with self._changed:
            stored = self._queues.get(queue.name)
            return stored is not None and stored.consumer is not None

    @override
    def delete(self, queues: Iterable[Queue]) -> None:
        with self._changed:
            for queue in queues:
                self._queues.pop(queue.name, None)

    def peek(self, queue: Queue) -> list[Delivery]:
        """Return the deliveries that wait in `queue`, oldest first."""
        with self._changed:
            return list(self._stored(queue).waiting)

    def _stored(self, queue: Queue) -> _StoredQueue:
        if queue.name not in self._queues:
            raise BrokerError(205, f"queue {queue.name} does not exist.", "open the run first: nightsplit open.")
        return self._queues[queue.name]


class _MemoryLink(Link):
    def __init__(self, broker: MemoryBroker, consume: Sequence[Queue], prefetch: int) -> None:
        self._broker = broker
        self._consume = consume
        self._prefetch = prefetch
        self._events: deque[Event] = deque()
        self._outbox: deque[tuple[Queue, Delivery]] = deque()
        self._is_blocked = False

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        message = Delivery(queue.name, message_id, b"".join(body), dict(headers))
        check_size(queue, message_id, len(message.body), self._broker._max_message_bytes)
        with self._broker._changed:
            self._broker._stored(queue)
            self._outbox.append((queue, message))
            self._offer()

    @override
    def receive(self, timeout: float) -> Event | None:
        deadline = time.monotonic() + timeout
        with self._broker._changed:
            while True:
                self._offer()
                self._take()
                if self._events:
                    return self._events.popleft()
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._broker._changed.wait(left)

    @override
    def acknowledge(self, delivery: Delivery) -> None:
        with self._broker._changed:
            stored = self._broker._queues.get(delivery.queue)
            if stored is not None and stored.consumer is self:
                stored.handed_out = [held for held in stored.handed_out if held.tag != delivery.tag]
            self._broker._changed.notify_all()

    @override
    def give_back(self, delivery: Delivery) -> None:
        with self._broker._changed:
            stored = self._broker._queues.get(delivery.queue)
            if stored is not None and stored.consumer is self:
                stored.waiting.extendleft(held for held in stored.handed_out if held.tag == delivery.tag)
                stored.handed_out = [held for held in stored.handed_out if held.tag != delivery.tag]

    @property
    @override
    def unconfirmed(self) -> frozenset[str]:
        return frozenset(message.message_id for _, message in self._outbox)

    @property
    @override
    def prefetch(self) -> int:
        return self._prefetch

    @override
    def raise_prefetch(self, prefetch: int) -> None:
        self._prefetch = max(prefetch, self._prefetch)

    @override
    def close(self) -> None:
        with self._broker._changed:
            for queue in self._consume:
                stored = self._broker._queues.get(queue.name)
                if stored is not None and stored.consumer is self:
                    # One that was given back before is behind those that came after it.
                    stored.waiting.extendleft(sorted(stored.handed_out, key=_place, reverse=True))
                    stored.handed_out.clear()
                    stored.consumer = None
            self._outbox.clear()
            self._events.clear()
            self._broker._changed.notify_all()

    def _offer(self) -> None:
        """Store the messages that their queues have room for, oldest first; a full queue delays those after it."""
        while self._outbox:
            queue, message = self._outbox[0]
            stored = self._broker._stored(queue)
            limit = queue.limit_bytes
            if limit is not None and sum(len(delivery.body) for delivery in (*stored.waiting, message)) > limit:
                if not self._is_blocked:
                    self._events.append(Blocked(f"queue {queue.name} is full"))
                self._is_blocked = True
                return
            self._outbox.popleft()
            self._broker._tags += 1
            stored.waiting.append(replace(message, tag=self._broker._tags))
            self._events.append(Confirmed(message.message_id))
            if self._is_blocked:
                self._events.append(Unblocked())
            self._is_blocked = False
            self._broker._changed.notify_all()

    def _take(self) -> None:
        """Receive from queues that no other link consumes, up to the prefetch of each."""
        for queue in self._consume:
            stored = self._broker._stored(queue)
            if stored.consumer is None:
                stored.consumer = self
            while stored.consumer is self and stored.waiting and len(stored.handed_out) < self._prefetch:
                delivery = stored.waiting.popleft()
                stored.handed_out.append(replace(delivery, redelivered=True))
                self._events.append(delivery)


def _place(delivery: Delivery) -> int:
    """Return the number of a delivery among all messages of the broker."""
    assert isinstance(delivery.tag, int)
    return delivery.tag
