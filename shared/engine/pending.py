"""Pending work: deliveries to acknowledge, sends to be confirmed, and a snapshot to write."""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.transport import Delivery, without_content


@dataclass(slots=True)
class PendingSnapshot:
    """Snapshot that waits until the sends it counts are confirmed."""

    snapshot: Snapshot
    waiting_for: set[str]


class UnackedDeliveries:
    """Applied deliveries that are not in the oldest kept checkpoint yet.

        add ──▶ open ──seal──▶ in a snapshot ──free──▶ in the newest checkpoint ──free──▶ acknowledged

    Args:
        keep: number of kept checkpoints. A delivery is freed when all of them contain it: a fallback to
            the oldest must still find its inputs at the broker.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._open: list[Delivery] = []
        self._open_per_queue: Counter[str] = Counter()
        self._sealed: deque[list[Delivery]] = deque()
        self._kept_per_queue: Counter[str] = Counter()

    def add(self, delivery: Delivery) -> None:
        """Add a delivery that the role's state contains."""
        self._open.append(without_content(delivery))
        self._open_per_queue[delivery.queue] += 1
        self._kept_per_queue[delivery.queue] += 1

    def seal(self) -> None:
        """Assign all open deliveries to a new snapshot."""
        self._sealed.append(self._open)
        self._open, self._open_per_queue = [], Counter()

    def free(self) -> Iterator[Delivery]:
        """Yield the deliveries that all kept checkpoints contain, once the last snapshot is one of them."""
        while len(self._sealed) >= self._keep:
            yield from self._free_oldest()

    def free_all(self) -> Iterator[Delivery]:
        """Yield all sealed deliveries, once every kept checkpoint contains the end."""
        while self._sealed:
            yield from self._free_oldest()

    def _free_oldest(self) -> list[Delivery]:
        freed = self._sealed.popleft()
        self._kept_per_queue.subtract(delivery.queue for delivery in freed)
        return freed

    @property
    def open_max(self) -> int:
        """Number of deliveries that no snapshot contains yet, at the queue with most of them."""
        return max(self._open_per_queue.values(), default=0)

    @property
    def has_sealed(self) -> bool:
        """True if snapshots contain deliveries that only further checkpoints can free."""
        return any(self._sealed)

    def count(self, queue: str) -> int:
        """Return the number of a queue's deliveries that are not freed."""
        return self._kept_per_queue[queue]


class UnconfirmedSends:
    """Published sequenced messages that the broker has not confirmed yet."""

    def __init__(self) -> None:
        self._unconfirmed: dict[str, tuple[str, int]] = {}
        self._latest: dict[str, int] = {}

    def add(self, message_id: str, receiver: str, seq: int) -> None:
        """Add a published message."""
        self._unconfirmed[message_id] = receiver, seq
        self._latest[receiver] = seq

    def confirm(self, message_id: str) -> None:
        """Remove a message that the broker has confirmed."""
        self._unconfirmed.pop(message_id, None)

    def __contains__(self, message_id: object) -> bool:
        return message_id in self._unconfirmed

    @property
    def first(self) -> int | None:
        """Lowest unconfirmed seq; meaningful for a single receiver."""
        return min((seq for _, seq in self._unconfirmed.values()), default=None)

    def is_ahead(self, limit: int) -> bool:
        """Return whether some receiver's oldest unconfirmed message and those after it number `limit` or more."""
        oldest: dict[str, int] = {}
        for receiver, seq in self._unconfirmed.values():
            oldest[receiver] = min(seq, oldest.get(receiver, seq))
        return any(self._latest[receiver] - seq + 1 >= limit for receiver, seq in oldest.items())
