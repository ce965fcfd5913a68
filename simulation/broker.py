"""A broker inside one process, for unit tests. Its queues, dead letters included, can be read."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from typing_extensions import override

from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Broker, Confirmed, Delivery, Event, Link, Queue, Unblocked


class _Stored:
    """A queue's content: waiting messages, those handed out, and who consumes."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.waiting: deque[Delivery] = deque()
        self.handed_out: list[Delivery] = []
        self.consumer: _MemoryLink | None = None

    @property
    def bytes(self) -> int:
        return sum(len(delivery.body) for delivery in self.waiting)


class MemoryBroker(Broker):
    """Queues in this process. Messages outlive links, not the process."""

    max_message_bytes = 16 * 2**20

    def __init__(self) -> None:
        self._queues: dict[str, _Stored] = {}
        self._tags = 0
        self._changed = threading.Condition()

    @override
    def declare(self, queues: Iterable[Queue]) -> None:
        with self._changed:
            for queue in queues:
                known = self._queues.setdefault(queue.name, _Stored(queue))
                if known.queue != queue:
                    raise BrokerError(
                        204,
                        f"queue {queue.name} exists with {known.queue}, asked for {queue}.",
                        "use the run's original limits, or another run id.",
                    )

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
    def delete(self, queues: Iterable[Queue]) -> None:
        with self._changed:
            for queue in queues:
                self._queues.pop(queue.name, None)

    def peek(self, queue: Queue) -> list[Delivery]:
        """Return the deliveries that wait in `queue`, oldest first."""
        with self._changed:
            return list(self._stored(queue).waiting)

    def _stored(self, queue: Queue) -> _Stored:
        try:
            return self._queues[queue.name]
        except KeyError:
            raise BrokerError(
                205, f"queue {queue.name} does not exist.", "open the run first: nightsplit open."
            ) from None


class _MemoryLink(Link):
    def __init__(self, broker: MemoryBroker, consume: Sequence[Queue], prefetch: int) -> None:
        self._broker = broker
        self._consume = consume
        self._prefetch = prefetch
        self._events: deque[Event] = deque()
        self._outbox: deque[tuple[Queue, Delivery]] = deque()
        self._troubled = False

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        message = Delivery(queue.name, message_id, b"".join(body), dict(headers))
        if len(message.body) > self._broker.max_message_bytes and queue.dead_key is not None:
            raise BrokerError(
                203,
                f"{message_id} has {len(message.body)} bytes, the limit is {self._broker.max_message_bytes}.",
                "lower run.batch_size or choose a smaller codec.",
            )
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
                    stored.waiting.extendleft(reversed(stored.handed_out))
                    stored.handed_out.clear()
                    stored.consumer = None
            self._outbox.clear()
            self._events.clear()
            self._broker._changed.notify_all()

    def _offer(self) -> None:
        """Store what the queues have room for, oldest first; a full queue holds up the rest."""
        while self._outbox:
            queue, message = self._outbox[0]
            stored = self._broker._stored(queue)
            if queue.limit_bytes is not None and stored.bytes + len(message.body) > queue.limit_bytes:
                if not self._troubled:
                    self._events.append(Blocked(f"queue {queue.name} is full"))
                self._troubled = True
                return
            self._outbox.popleft()
            self._broker._tags += 1
            stored.waiting.append(
                Delivery(message.queue, message.message_id, message.body, message.headers, tag=self._broker._tags)
            )
            self._events.append(Confirmed(message.message_id))
            if self._troubled:
                self._events.append(Unblocked())
            self._troubled = False
            self._broker._changed.notify_all()

    def _take(self) -> None:
        """Receive from queues that nobody else consumes, up to the prefetch of each."""
        for queue in self._consume:
            stored = self._broker._stored(queue)
            if stored.consumer is None:
                stored.consumer = self
            while stored.consumer is self and stored.waiting and len(stored.handed_out) < self._prefetch:
                delivery = stored.waiting.popleft()
                stored.handed_out.append(
                    Delivery(delivery.queue, delivery.message_id, delivery.body, delivery.headers, True, delivery.tag)
                )
                self._events.append(
                    Delivery(
                        delivery.queue,
                        delivery.message_id,
                        delivery.body,
                        delivery.headers,
                        delivery.redelivered,
                        delivery.tag,
                    )
                )
