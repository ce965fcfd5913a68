"""Deliveries of one sender that wait for their turn, in bounded memory.

    in its turn ──▶ kept with its body ──▶ applied
    beyond INBOX_BYTES ──▶ without its body ──(memory is free, or it is next)──▶ given back ──▶ comes again

All of them stay unacknowledged at the broker, so none can be lost. A sender that leaves out a number therefore fills
neither this worker's memory nor, since the prefetch grows only as far as a genuine disorder needs it, the broker.
"""

from logging import WARNING

from nightsplit.shared.engine.mailbox import Received
from nightsplit.shared.log import event
from nightsplit.shared.transport import Delivery, Queue, without_content

INBOX_BYTES = 128 * 2**20
"""Bodies that are kept of one sender. A worker's prefetch is chosen so that those of a genuine one fit."""

WAITING_MAX = 2**14
"""Largest number of deliveries of one sender that wait."""


class Inbox:
    """Deliveries from one queue, by seq."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._received: dict[int, Received] = {}
        self._without_body: dict[int, tuple[Delivery, int]] = {}
        """Deliveries whose body is only at the broker, with its size."""
        self._bytes = 0
        self._may_grow = True
        self._highest = 0
        """Highest seq of any delivery."""

    def __len__(self) -> int:
        return len(self._received) + len(self._without_body)

    def __contains__(self, seq: object) -> bool:
        """Return whether `seq` can be applied."""
        return seq in self._received

    def gap_before(self, received: Received, mark: int) -> range:
        """Return the numbers, later than `mark`, between a delivery and all before it: these messages were lost.

        A queue keeps the order of messages that it delivers for the first time, not of those that come again.
        """
        seq, expected = received.header.seq, max(self._highest, mark) + 1
        self._highest = max(self._highest, seq)
        return range(0) if received.delivery.redelivered else range(expected, seq)

    def missing(self, mark: int, last: int) -> range:
        """Return the numbers from the first missing one after `mark` to the last one up to `last`; empty for none."""
        here = self._received.keys() | self._without_body.keys()
        first = mark + 1
        while first in here:
            first += 1
        while last in here:
            last -= 1
        return range(first, last + 1)

    def put(self, received: Received, is_next: bool) -> Delivery | None:
        """Add a delivery, if it is not the next one perhaps without its body; return an older one of the same seq."""
        seq, size = received.header.seq, received.delivery.size
        older = self._remove(seq)  # the newer one stays, since the older may be from before a reconnect
        if is_next or self._bytes + size <= INBOX_BYTES:
            self._received[seq] = received
            self._bytes += size
        else:
            self._without_body[seq] = without_content(received.delivery), size
        return older

    def pop(self, seq: int) -> Received:
        """Remove the delivery that is applied."""
        received = self._received.pop(seq)
        self._bytes -= received.delivery.size
        return received

    def clear(self) -> list[Delivery]:
        """Remove all deliveries, and return them."""
        return [delivery for seq in [*self._received, *self._without_body] if (delivery := self._remove(seq))]

    def recall(self, next_seq: int, message_bytes: int) -> Delivery | None:
        """Remove the first delivery without its body, if that is needed next or fits; it is to be given back."""
        seq = min(self._without_body, default=None)
        if seq is None or (seq != next_seq and self._bytes + message_bytes > INBOX_BYTES):
            return None
        return self._without_body.pop(seq)[0]

    @property
    def may_grow(self) -> bool:
        """True while what is missing can be behind the messages that wait: their queue never held more."""
        waiting = self._bytes + sum(size for _, size in self._without_body.values())
        limit = self._queue.limit_bytes
        may_grow = len(self) < WAITING_MAX and (limit is None or waiting < limit + INBOX_BYTES)
        if self._may_grow and not may_grow:
            event("message_missing", WARNING, queue=self._queue.name, waiting=len(self))
        self._may_grow = may_grow
        return may_grow

    def _remove(self, seq: int) -> Delivery | None:
        if seq in self._received:
            return self.pop(seq).delivery
        delivery, _ = self._without_body.pop(seq, (None, 0))
        return delivery
