"""Interface of all brokers: durable queues, and one `Link` per worker.

A broker moves bytes, without knowledge of tensors or models.

A link is a single stream of events, so that a worker waits in one place:

    worker ──publish──▶ link ──▶ broker          Confirmed   the broker holds the message durably
    worker ◀─receive─── link ◀── broker          Delivery    a message, at least once, in order
                                                 Blocked     the broker refuses or is away; the link keeps trying
                                                 Unblocked   the broker accepts messages again

Publishing never fails for a temporary reason: a link keeps a message, and publishes it again after a
full queue, an alarm or a lost connection, until the broker confirms it or the link is closed.
A message that is unconfirmed when its link closes counts as never sent.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from nightsplit.shared.errors import BrokerError, Refused


@dataclass(frozen=True, slots=True)
class Queue:
    """Durable queue.

    Attributes:
        name: name, unique at the broker.
        exchange: direct exchange that leads to it.
        key: routing key.
        limit_bytes: capacity; a publish that would exceed it is refused (back-pressure), though a cluster may take
            messages that are published together. None for no limit.
        dead: its dead letter queue; None for a dead letter queue itself.
    """

    name: str
    exchange: str
    key: str
    limit_bytes: int | None
    dead: "Queue | None"


@dataclass(frozen=True, slots=True)
class Route:
    """Queues of a worker for messages to one peer, messages from it, and dead letters."""

    outgoing: Queue
    incoming: Queue
    dead: Queue


@dataclass(frozen=True, slots=True)
class Delivery:
    """Message handed to the worker. It stays at the broker until it is acknowledged.

    `redelivered` does not mean a duplicate: it is also true for messages that were never handled.
    `user` is the publisher, verified by the broker; None if the broker does not distinguish users,
    empty if it does and the message has no user.
    `envelope` holds the bytes from the broker where `body` is their opened content; `refusal` is the error if they
    could not be opened, and `body` is then empty.
    `tag` is for the link's own use.
    """

    queue: str
    message_id: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    redelivered: bool = False
    tag: object = None
    user: str | None = None
    envelope: bytes | None = None
    refusal: Refused | None = None

    def may_be_from(self, *workers: str) -> bool:
        """Return whether one of `workers` published it, as far as the broker can tell."""
        return self.user is None or self.user in workers

    @property
    def size(self) -> int:
        """Bytes in memory: of the message, and of its envelope."""
        return len(self.body) + len(self.envelope or b"")

    @property
    def original(self) -> bytes:
        """Bytes as they came from the broker."""
        return self.body if self.envelope is None else self.envelope

    @property
    def by(self) -> str:
        """Publisher in a sentence: ' from user north', or empty if the broker does not distinguish users."""
        return "" if self.user is None else f" from user {self.user or 'unknown'}"


def without_content(delivery: Delivery) -> Delivery:
    """Return a delivery as it is kept until it is acknowledged: a night's bodies would fill the memory."""
    return replace(delivery, body=b"", headers={}, envelope=None)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """Confirmation that the broker holds a message durably; only then does it count as sent."""

    message_id: str


@dataclass(frozen=True, slots=True)
class Blocked:
    """Interruption of publishing or consuming; nothing is lost and the link keeps trying."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unblocked:
    """End of the interruption that `Blocked` reported."""


Event = Delivery | Confirmed | Blocked | Unblocked


def check_size(queue: Queue, message_id: str, size: int, limit: int) -> None:
    """Raise BrokerError 203 if a message is too large; a dead letter may be: the broker accepted it before."""
    if size > limit and queue.dead is not None:
        sentence = f"{message_id} has {size} bytes, the limit is {limit}."
        raise BrokerError(203, sentence, "lower run.batch_size or choose a smaller codec.")


class Link(ABC):
    """Connection of one worker to the broker. Used from one thread; closes as a context manager."""

    @abstractmethod
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        """Publish a message and return at once. Its `Confirmed` event follows, perhaps much later.

        `body` is in pieces, which are joined on the wire and must not change afterwards.

        Raises:
            BrokerError: 203 the message is larger than this run allows (a dead letter may be: the broker
                accepted it before), 205 the queue does not exist (raised by a later call if the broker
                answers late).
        """

    @abstractmethod
    def receive(self, timeout: float) -> Event | None:
        """Return the next event, or None after `timeout` seconds.

        Raises:
            BrokerError: a failure that no retry can repair (login refused, queue missing, queue taken over).
        """

    @abstractmethod
    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge a delivery. One from before a reconnect is ignored: it comes again."""

    @abstractmethod
    def give_back(self, delivery: Delivery) -> None:
        """Return a delivery to the front of its queue, from where it comes again. One from before a reconnect does so
        by itself."""

    @property
    @abstractmethod
    def unconfirmed(self) -> frozenset[str]:
        """Ids of the published messages that are not confirmed yet."""

    @property
    @abstractmethod
    def prefetch(self) -> int:
        """Largest number of unacknowledged deliveries per queue."""

    @abstractmethod
    def raise_prefetch(self, prefetch: int) -> None:
        """Raise the prefetch; unacknowledged deliveries may come again."""

    @abstractmethod
    def close(self) -> None:
        """Close the link; acknowledgements before it are settled, unless the broker does not answer in time.

        Unacknowledged deliveries return to their queues in order. In a cluster they return behind those that returned
        earlier and were not delivered since: after a smaller prefetch than the one before, the order is turned round.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Broker(ABC):
    """Broker of durable queues."""

    @abstractmethod
    def declare(self, queues: Iterable[Queue]) -> None:
        """Create missing queues; BrokerError 201 unreachable, 202 login refused, 204 other settings."""

    @abstractmethod
    def link(self, consume: Sequence[Queue], prefetch: int, owner: str) -> Link:
        """Open a link that receives from `consume`, with this prefetch for each queue.

        At most one owner consumes a queue at a time; another waits until the first closes, dies
        or falls silent. `owner` names the worker: a restart under the same name takes over at once.
        """

    @abstractmethod
    def depth(self, queue: Queue) -> int | None:
        """Return the number of waiting messages; None if the queue is missing.

        Unacknowledged ones are not counted, if the broker can distinguish them.
        """

    @abstractmethod
    def is_consumed(self, queue: Queue) -> bool:
        """Return whether an owner consumes `queue`; if none does, `depth` counts all of its messages."""

    @abstractmethod
    def delete(self, queues: Iterable[Queue]) -> None:
        """Delete queues with all their messages."""
