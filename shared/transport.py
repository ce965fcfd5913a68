"""What every broker offers: durable queues, and one `Link` per worker.

The broker moves bytes. It knows no tensor and no model.

A link is a single stream of events, so that a worker waits in one place:

    worker ──publish──▶ link ──▶ broker          Confirmed   the broker holds the message durably
    worker ◀─receive─── link ◀── broker          Delivery    a message, at least once, in order
                                                 Blocked     the broker refuses or is away; the link goes on trying
                                                 Unblocked   it accepts again

Publishing never fails for a passing reason: a link keeps a message, and offers it again after a
full queue, an alarm or a lost connection, until the broker confirms it or the link is closed.
What was not confirmed when a link closes was never sent.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue.

    Attributes:
        name: unique at the broker.
        exchange: direct exchange that leads to it; also its dead letter exchange.
        key: routing key.
        limit_bytes: a publish that would exceed it is refused (back-pressure); None for no limit.
        dead_key: routing key of the queue that takes what this one rejects; None for a dead letter queue.
    """

    name: str
    exchange: str
    key: str
    limit_bytes: int | None
    dead_key: str | None


@dataclass(frozen=True, slots=True)
class Route:
    """Where messages to one peer go, and where messages from it come from."""

    outgoing: Queue
    incoming: Queue
    dead: Queue


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message handed to the worker. It stays at the broker until it is acknowledged.

    `redelivered` says nothing about duplicates: it is true for messages that no handler ever saw.
    `user` is who published it, by the broker's own check; None where the broker does not tell users
    apart, empty where it would and the message does not say.
    `tag` is the link's own business.
    """

    queue: str
    message_id: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    redelivered: bool = False
    tag: object = None
    user: str | None = None

    def may_be_from(self, *workers: str) -> bool:
        """Whether one of `workers` published it, as far as the broker can tell."""
        return self.user is None or self.user in workers

    @property
    def by(self) -> str:
        """' from user north', for a sentence; nothing where the broker does not tell."""
        return "" if self.user is None else f" from user {self.user or 'unknown'}"


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The broker holds the message durably. Only this means that it was sent."""

    message_id: str


@dataclass(frozen=True, slots=True)
class Blocked:
    """Publishing or consuming is held up; nothing is lost and the link goes on trying."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unblocked:
    """What `Blocked` reported is over."""


Event = Delivery | Confirmed | Blocked | Unblocked


class Link(ABC):
    """One worker's line to the broker. Used from one thread; closes as a context manager."""

    @abstractmethod
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        """Hand a message over; returns at once. Its `Confirmed` event follows, perhaps much later.

        `body` is given in pieces that are joined on the wire, and must not change afterwards.

        Raises:
            BrokerError: 203 when the message is larger than this run allows (a dead letter may be: the
                broker took it before), 205 when the queue does not exist (raised by a later call
                where the broker answers late).
        """

    @abstractmethod
    def receive(self, timeout: float) -> Event | None:
        """The next event, waiting up to `timeout` seconds; None when there was none.

        Raises:
            BrokerError: what no retry can mend (login refused, queue missing, queue taken over).
        """

    @abstractmethod
    def acknowledge(self, delivery: Delivery) -> None:
        """Let the broker forget a delivery. One from before a reconnect is ignored: it comes again."""

    @property
    @abstractmethod
    def unconfirmed(self) -> frozenset[str]:
        """Ids of messages that were published and are not confirmed yet."""

    @property
    @abstractmethod
    def prefetch(self) -> int:
        """Deliveries per queue that may be unacknowledged at the same time."""

    @abstractmethod
    def raise_prefetch(self, prefetch: int) -> None:
        """Allow more unacknowledged deliveries per queue; unacknowledged ones may come again."""

    @abstractmethod
    def close(self) -> None:
        """Let go. Unacknowledged deliveries return to their queues, in their order."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class Broker(ABC):
    """A place of durable queues."""

    @property
    @abstractmethod
    def max_message_bytes(self) -> int:
        """Largest body that `Link.publish` takes."""

    @abstractmethod
    def declare(self, queues: Iterable[Queue]) -> None:
        """Create the queues that do not exist; BrokerError 201 unreachable, 202 login refused, 204 other settings."""

    @abstractmethod
    def link(self, consume: Sequence[Queue], prefetch: int, owner: str) -> Link:
        """Open a line that receives from `consume`, each queue with its own prefetch.

        At most one owner consumes a queue at a time; another waits until the first closes, dies
        or stays silent. `owner` names the worker: a restart under the same name takes over at once.
        """

    @abstractmethod
    def depth(self, queue: Queue) -> int | None:
        """Messages waiting, not counting unacknowledged ones where the broker can tell; None if absent."""

    @abstractmethod
    def delete(self, queues: Iterable[Queue]) -> None:
        """Remove queues with all they hold."""
