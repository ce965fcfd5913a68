"""Inputs until they may be acknowledged, sends until they are confirmed, a snapshot until it may be written."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.transport import Delivery


@dataclass(slots=True)
class PendingSnapshot:
    """A snapshot that waits until the sends it counts are confirmed."""

    snapshot: Snapshot
    waiting_for: set[str]


class UnackedDeliveries:
    """Deliveries that were applied, until the oldest kept checkpoint contains them.

        take ──▶ open ──seal──▶ in a snapshot ──saved──▶ in the newest checkpoint ──saved──▶ free

    Args:
        keep: checkpoints that stay on disk. A delivery is free when all of them contain it: falling
            back to the oldest must still find its inputs at the broker.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._open: list[Delivery] = []
        self._open_per_queue: Counter[str] = Counter()
        self._sealed: deque[list[Delivery]] = deque()
        self._kept_per_queue: Counter[str] = Counter()

    def take(self, delivery: Delivery) -> None:
        """Keep a delivery whose effect is in the role's state."""
        # Only the tag is still needed: bodies kept here would hold a night's memory.
        self._open.append(replace(delivery, body=b""))
        self._open_per_queue[delivery.queue] += 1
        self._kept_per_queue[delivery.queue] += 1

    def seal(self) -> None:
        """A snapshot was taken: it contains what was taken so far."""
        self._sealed.append(self._open)
        self._open, self._open_per_queue = [], Counter()

    def saved(self) -> Iterator[Delivery]:
        """The last snapshot is a checkpoint now; gives what may be acknowledged."""
        while len(self._sealed) >= self._keep:
            yield from self._free_oldest()

    def release(self) -> Iterator[Delivery]:
        """Every kept checkpoint holds the end; gives the rest."""
        while self._sealed:
            yield from self._free_oldest()

    def _free_oldest(self) -> list[Delivery]:
        freed = self._sealed.popleft()
        self._kept_per_queue.subtract(delivery.queue for delivery in freed)
        return freed

    @property
    def most_open(self) -> int:
        """Deliveries of one queue that no snapshot contains yet; the most of any queue."""
        return max(self._open_per_queue.values(), default=0)

    @property
    def sealed(self) -> bool:
        """Whether snapshots contain deliveries that only further checkpoints set free."""
        return any(self._sealed)

    def of(self, queue: str) -> int:
        """Deliveries of a queue that are not free."""
        return self._kept_per_queue[queue]


class UnconfirmedSends:
    """Messages in sequence that were published, until the broker confirms them."""

    def __init__(self) -> None:
        self._unconfirmed: dict[str, tuple[str, int]] = {}
        self._latest: dict[str, int] = {}

    def add(self, message_id: str, receiver: str, seq: int) -> None:
        """A message was published."""
        self._unconfirmed[message_id] = receiver, seq
        self._latest[receiver] = seq

    def confirmed(self, message_id: str) -> None:
        """The broker has it."""
        self._unconfirmed.pop(message_id, None)

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._unconfirmed

    @property
    def first(self) -> int | None:
        """Lowest seq that is not confirmed; meaningful where there is one receiver."""
        return min((seq for _, seq in self._unconfirmed.values()), default=None)

    def is_ahead(self, limit: int) -> bool:
        """Whether the latest message to a receiver is `limit` or more beyond its oldest unconfirmed one."""
        oldest: dict[str, int] = {}
        for receiver, seq in self._unconfirmed.values():
            oldest[receiver] = min(seq, oldest.get(receiver, seq))
        return any(self._latest[receiver] - seq + 1 >= limit for receiver, seq in oldest.items())
