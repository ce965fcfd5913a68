"""A worker's line to the embedded broker: its own thread reads, the writer's thread writes.

    worker's thread    publish ──────▶ outbox ──┐            ┌──▶ rows and body files
                       acknowledge ──▶ acks ────┼── writer ─┤
                       receive ◀── Confirmed ◀──┘            └──▶ leases
                       receive ◀── Delivery ◀─────────────────── rows, read without a lock

The writer works also while the worker computes, so a long computation keeps its leases and a
stopped or dead process loses them. What waits in the outbox goes into one transaction, so that many
messages share an fsync. `Confirmed` means that body file, directory and row were synced, in this
order.
"""

import fcntl
import json
import math
import os
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

from nightsplit.broker.embedded.storage import Folder, NewRow
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.storage.sqlite import broker_errors, explain, is_locked, transaction
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Event, Link, Queue, Unblocked

INLINE_BYTES = 64 * 2**10
"""Bodies up to this size lie in their row; a larger one would be written twice, to the log and the table."""

BATCH_BYTES = 32 * 2**20
"""Bodies per transaction, so that a long outbox does not keep the writer from renewing its leases."""

BEAT_SECONDS = 0.05
"""How often a writer looks whether a full queue, a busy lease or a full disk has become free."""

LONGEST_POLL_SECONDS = 0.02
"""How late `receive` may notice what another process published."""


@dataclass(eq=False, slots=True)
class _Outgoing:
    """A message on its way, and the file that holds its body once that is written."""

    queue: Queue
    message_id: str
    body: Sequence[bytes | memoryview]
    headers: str
    size: int
    file: str | None = None

    def row(self) -> NewRow:
        body = b"".join(self.body) if self.file is None else None
        return self.queue.name, self.message_id, self.headers, self.size, body, self.file


class EmbeddedLink(Link):
    """See `Link`. Lets go of everything when it is closed."""

    def __init__(
        self, folder: Folder, max_message_bytes: int, consume: Sequence[Queue], prefetch: int, owner: str
    ) -> None:
        self._folder = folder
        self._max_message_bytes = max_message_bytes
        self._owner = owner
        self._name = uuid.uuid4().hex
        self._prefetch = prefetch
        self._turns = deque(queue.name for queue in consume)
        self._unacknowledged: dict[str, dict[object, str | None]] = {queue: {} for queue in self._turns}
        self._taken = dict.fromkeys(self._turns, 0)

        # Shared with the writer, under `_changed`.
        self._changed = threading.Condition()
        self._outbox: list[_Outgoing] = []
        self._acks: dict[int, str | None] = {}
        self._events: deque[Event] = deque()
        self._failure: BrokerError | None = None
        self._stirred = False
        self._closing = False

        # The writer's own.
        self._held: dict[str, int] = {}  # queues whose lease we have -> `taken` as last written
        self._renew_at = 0.0
        self._troubled = False

        with broker_errors(201, folder.path), ExitStack() as opened:
            self._rows = opened.enter_context(closing(folder.open()))
            for queue in self._turns:
                folder.require(self._rows, queue)
            self._courier_rows = opened.enter_context(closing(folder.open()))
            self._lock = folder.open_lock()
            opened.callback(os.close, self._lock)
            with suppress(sqlite3.OperationalError):  # Who comes first is first; the writer tries again.
                self._settle()
            self._opened = opened.pop_all()
        self._writer = threading.Thread(target=self._work, name=f"writer of {owner}", daemon=True)
        self._writer.start()

    # The worker's thread ---------------------------------------------------------------------

    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        """Hand a message to the writer; see `Link.publish` for 203 and 205."""
        size = sum(memoryview(piece).nbytes for piece in body)
        if size > self._max_message_bytes and queue.dead_key is not None:
            raise BrokerError(
                203,
                f"{message_id} has {size} bytes, the limit is {self._max_message_bytes}.",
                "lower run.batch_size or choose a smaller codec.",
            )
        with broker_errors(201, self._folder.path):
            self._folder.require(self._rows, queue.name)
        with self._changed:
            self._outbox.append(_Outgoing(queue, message_id, body, json.dumps(dict(headers)), size))
            self._stir()

    def receive(self, timeout: float) -> Event | None:
        """The next event; see `Link.receive`. Raises BrokerError 201, 205, 208."""
        deadline = time.monotonic() + timeout
        poll = 0.001
        while True:
            with self._changed:
                if self._events:
                    return self._events.popleft()
                if self._failure is not None:
                    raise self._failure
            delivery = self._take()
            if delivery is not None:
                return delivery
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            with self._changed:
                if not self._events and self._failure is None:
                    self._changed.wait(min(poll, left))
            poll = min(2 * poll, LONGEST_POLL_SECONDS)

    def acknowledge(self, delivery: Delivery) -> None:
        """Have the writer remove a message, unless the queue was taken over."""
        held = self._unacknowledged.get(delivery.queue, {})
        if isinstance(delivery.tag, int) and delivery.tag in held:
            with self._changed:
                self._acks[delivery.tag] = held.pop(delivery.tag)
                self._stir()

    @property
    def unconfirmed(self) -> frozenset[str]:
        """Ids in the outbox."""
        with self._changed:
            return frozenset(message.message_id for message in self._outbox)

    @property
    def prefetch(self) -> int:
        """Deliveries per queue that may be unacknowledged."""
        return self._prefetch

    def raise_prefetch(self, prefetch: int) -> None:
        """Allow more; nothing comes again."""
        self._prefetch = max(prefetch, self._prefetch)

    def close(self) -> None:
        """Settle acknowledgements, drop what is unconfirmed, give up the leases."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join()
        self._opened.close()

    def _stir(self) -> None:
        self._stirred = True
        self._changed.notify_all()

    def _take(self) -> Delivery | None:
        """The oldest message of the next queue that has one and may deliver it."""
        for _ in range(len(self._turns)):
            queue = self._turns[0]
            self._turns.rotate(-1)
            if len(self._unacknowledged[queue]) < self._prefetch:
                delivery = self._read(queue)
                if delivery is not None:
                    return delivery
        return None

    def _read(self, queue: str) -> Delivery | None:
        with broker_errors(201, self._folder.path):
            try:
                row = self._folder.next_row(self._rows, queue, self._name, self._taken[queue])
            except sqlite3.OperationalError as error:
                if not is_locked(error):
                    raise
                row = None
        if row is None:
            return None
        tag, message_id, headers, body, file, redelivered = row
        self._taken[queue] = tag
        self._unacknowledged[queue][tag] = file
        return Delivery(queue, message_id, body, json.loads(headers), bool(redelivered), tag)

    # The writer's thread --------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._idle():
                try:
                    self._settle()
                    full = self._send()
                except (sqlite3.OperationalError, OSError) as error:
                    self._report(self._folder.trouble(error))
                    time.sleep(BEAT_SECONDS)
                else:
                    self._report(f"queue {min(full)} is full" if full else None)
            self._settle()
        except BrokerError as error:
            self._fail(error)
        except (sqlite3.Error, OSError) as error:
            self._fail(BrokerError(201, f"{self._folder.path}: {explain(error)}.", "repair or replace the folder."))
        with suppress(sqlite3.Error):  # What cannot be released runs out.
            self._folder.release(self._courier_rows, self._name)

    def _idle(self) -> bool:
        """Wait for something to do, a beat at most. True when the link closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._stirred or self._closing, BEAT_SECONDS)
            self._stirred = False
            return self._closing

    def _settle(self) -> None:
        """Keep or gain the leases and, in the same transaction, let go of what was acknowledged."""
        taken = dict(self._taken)
        with self._changed:
            acks = dict(self._acks)
        if not taken or (taken == self._held and not acks and time.monotonic() < self._renew_at):
            return
        with transaction(self._courier_rows):
            held = {queue: taken[queue] for queue in taken if self._lease(queue, taken[queue])}
            self._folder.remove_rows(self._courier_rows, acks)
        self._held = held
        self._renew_at = time.monotonic() + self._folder.lease_seconds / 3
        self._folder.remove_bodies(file for file in acks.values() if file is not None)
        with self._changed:
            for tag in acks:
                del self._acks[tag]

    def _lease(self, queue: str, taken: int) -> bool:
        held = queue in self._held
        gained = self._folder.lease(self._courier_rows, queue, self._owner, self._name, taken, held)
        if not gained:
            self._folder.require(self._courier_rows, queue)
        if held and not gained:
            raise BrokerError(
                208,
                f"{self._owner} lost queue {queue}: it was suspended, or started twice.",
                "make sure that only one such worker runs; it may be restarted.",
            )
        return gained

    def _send(self) -> set[str]:
        """Store what the queues have room for, oldest first. Returns the queues that are full."""
        with self._changed:
            batch = list(self._outbox)
        if not batch:
            return set()
        self._folder.require_room()
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        fitting, full = self._fitting(batch)
        large = [message for message in fitting if message.size > INLINE_BYTES and message.file is None]
        for message in large:
            message.file = self._folder.write_body(message.body)
        if large:
            self._folder.sync_bodies()
        with transaction(self._courier_rows):
            # Again, since another publisher may have been faster while the files were written.
            stored, overtaken = self._fitting(fitting)
            self._folder.insert(self._courier_rows, [message.row() for message in stored])
        gone = set(stored)
        with self._changed:
            self._outbox = [message for message in self._outbox if message not in gone]
            self._events += [Confirmed(message.message_id) for message in stored]
            self._stirred = self._stirred or not full
            self._changed.notify_all()
            if all(message.file is None for message in self._outbox):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        time.sleep(0.001)  # SQLite does not queue those who wait for its lock: leave them a gap.
        return full | overtaken

    def _fitting(self, batch: list[_Outgoing]) -> tuple[list[_Outgoing], set[str]]:
        """The oldest messages that fit into their queues and one transaction; the queues that are full."""
        room: dict[str, float] = {}
        fitting: list[_Outgoing] = []
        full: set[str] = set()
        size = 0
        for message in batch:
            name = message.queue.name
            if name not in room:
                room[name] = self._room(message.queue)
            if message.size > room[name]:
                full.add(name)
                room[name] = -1  # A smaller message behind it must not overtake.
                continue
            size += message.size
            if fitting and size > BATCH_BYTES:
                break
            room[name] -= message.size
            fitting.append(message)
        return fitting, full

    def _room(self, queue: Queue) -> float:
        self._folder.require(self._courier_rows, queue.name)
        waiting = self._folder.waiting(self._courier_rows, queue.name) if queue.limit_bytes is not None else None
        return math.inf if queue.limit_bytes is None or waiting is None else queue.limit_bytes - waiting[1]

    def _report(self, trouble: str | None) -> None:
        """Tell of trouble when it begins and when it is over."""
        with self._changed:
            if trouble is not None and not self._troubled:
                self._events.append(Blocked(trouble))
                self._changed.notify_all()
            if trouble is None and self._troubled:
                self._events.append(Unblocked())
                self._changed.notify_all()
            self._troubled = trouble is not None

    def _fail(self, error: BrokerError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()
