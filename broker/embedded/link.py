"""Link to the embedded broker: the worker's thread reads, a writer thread writes.

    worker's thread    publish ──────▶ outbox ──┐            ┌──▶ rows and body files
                       acknowledge ──▶ acks ────┼── writer ─┤
                       receive ◀── Confirmed ◀──┘            └──▶ leases
                       receive ◀── Delivery ◀─────────────────── rows, read without a lock

The writer also works while the worker computes, so a long computation keeps its leases and a
stopped or dead process loses them. The outbox goes into one transaction, so that many messages
share an fsync. `Confirmed` means that body file, directory and row were synced, in this order.
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

from typing_extensions import override

from nightsplit.broker.embedded.storage import Folder, NewRow
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.storage.sqlite import broker_errors, explain, is_locked, transaction
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Event, Link, Queue, Unblocked, check_size

INLINE_BYTES_MAX = 64 * 2**10
"""Size of the largest body kept in its row; a larger one would be written twice, to the log and the table."""

TRANSACTION_BYTES_MAX = 32 * 2**20
"""Size of the bodies in one transaction, so that a long outbox does not delay the renewal of the leases."""

WRITER_INTERVAL_S = 0.05
"""Seconds between two checks whether a full queue, a busy lease or a full disk has become free."""

POLL_INTERVAL_S_MAX = 0.02
"""Longest delay, in seconds, after which `receive` notices a message of another process."""


@dataclass(eq=False, slots=True)
class _OutgoingMessage:
    """Unconfirmed message, and the file that holds its body once it is written."""

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
    """Link to a broker's folder."""

    def __init__(
        self, folder: Folder, max_message_bytes: int, consume: Sequence[Queue], prefetch: int, owner: str
    ) -> None:
        self._folder = folder
        self._max_message_bytes = max_message_bytes
        self._owner = owner
        self._name = uuid.uuid4().hex
        self._prefetch = prefetch
        self._rotation = deque(queue.name for queue in consume)
        self._unacknowledged: dict[str, dict[object, str | None]] = {queue: {} for queue in self._rotation}
        self._last_delivered = dict.fromkeys(self._rotation, 0)
        self._given_back: dict[str, list[int]] = {queue: [] for queue in self._rotation}

        # Shared with the writer, under `_changed`.
        self._changed = threading.Condition()
        self._outbox: list[_OutgoingMessage] = []
        self._acks: dict[int, str | None] = {}
        self._events: deque[Event] = deque()
        self._failure: BrokerError | None = None
        self._has_work = False
        self._closing = False

        # The writer's own.
        self._leases: dict[str, int] = {}  # queues with our lease -> `taken` as last written
        self._renew_at = 0.0
        self._is_blocked = False

        with broker_errors(201, folder.path), ExitStack() as resources:
            self._rows = resources.enter_context(closing(folder.open()))
            for queue in self._rotation:
                folder.require(self._rows, queue)
            self._writer_rows = resources.enter_context(closing(folder.open()))
            self._lock = folder.open_lock()
            resources.callback(os.close, self._lock)
            with suppress(sqlite3.OperationalError):  # take the leases early if possible; the writer tries again
                self._update_leases()
            self._resources = resources.pop_all()
        self._writer = threading.Thread(target=self._work, name=f"writer of {owner}", daemon=True)
        self._writer.start()

    # The worker's thread ---------------------------------------------------------------------

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        size = sum(memoryview(piece).nbytes for piece in body)
        check_size(queue, message_id, size, self._max_message_bytes)
        with broker_errors(201, self._folder.path):
            self._folder.require(self._rows, queue.name)
        with self._changed:
            self._outbox.append(_OutgoingMessage(queue, message_id, body, json.dumps(dict(headers)), size))
            self._wake_writer()

    @override
    def receive(self, timeout: float) -> Event | None:
        """Return the next event, or None after `timeout` seconds; BrokerError 201, 205, 208."""
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
            poll = min(2 * poll, POLL_INTERVAL_S_MAX)

    @override
    def acknowledge(self, delivery: Delivery) -> None:
        """Pass a message to the writer for removal, unless another consumer has taken over the queue."""
        unacknowledged = self._unacknowledged.get(delivery.queue, {})
        if isinstance(delivery.tag, int) and delivery.tag in unacknowledged:
            with self._changed:
                self._acks[delivery.tag] = unacknowledged.pop(delivery.tag)
                self._wake_writer()

    @override
    def give_back(self, delivery: Delivery) -> None:
        if isinstance(delivery.tag, int) and delivery.tag in self._unacknowledged.get(delivery.queue, {}):
            del self._unacknowledged[delivery.queue][delivery.tag]
            self._given_back[delivery.queue].append(delivery.tag)

    @property
    @override
    def unconfirmed(self) -> frozenset[str]:
        with self._changed:
            return frozenset(message.message_id for message in self._outbox)

    @property
    @override
    def prefetch(self) -> int:
        return self._prefetch

    @override
    def raise_prefetch(self, prefetch: int) -> None:
        self._prefetch = max(prefetch, self._prefetch)

    @override
    def close(self) -> None:
        """Complete the acknowledgements, drop unconfirmed messages and give up the leases."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join()
        self._resources.close()

    def _wake_writer(self) -> None:
        self._has_work = True
        self._changed.notify_all()

    def _take(self) -> Delivery | None:
        """Return the oldest message of the next queue that may deliver one, or None."""
        for _ in range(len(self._rotation)):
            queue = self._rotation[0]
            self._rotation.rotate(-1)
            if len(self._unacknowledged[queue]) < self._prefetch:
                delivery = self._read(queue)
                if delivery is not None:
                    return delivery
        return None

    def _read(self, queue: str) -> Delivery | None:
        again = self._given_back[queue]
        taken = min(again) - 1 if again else self._last_delivered[queue]
        with broker_errors(201, self._folder.path):
            try:
                row = self._folder.next_row(self._rows, queue, self._name, taken)
            except sqlite3.OperationalError as error:
                if not is_locked(error):
                    raise
                row = None
        if row is None:
            return None
        tag, message_id, headers, body, file, redelivered = row
        self._last_delivered[queue] = max(tag, self._last_delivered[queue])
        if again:
            again.remove(tag)
        self._unacknowledged[queue][tag] = file
        return Delivery(queue, message_id, body, json.loads(headers), bool(redelivered), tag)

    # The writer's thread --------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._wait_for_work():
                try:
                    self._update_leases()
                    full = self._send()
                except (sqlite3.OperationalError, OSError) as error:
                    self._report(self._folder.describe(error))
                    time.sleep(WRITER_INTERVAL_S)
                else:
                    self._report(f"queue {min(full)} is full" if full else None)
            self._update_leases()
        except BrokerError as error:
            self._fail(error)
        except (sqlite3.Error, OSError) as error:
            self._fail(BrokerError(201, f"{self._folder.path}: {explain(error)}.", "repair or replace the folder."))
        with suppress(sqlite3.Error):  # a lease that cannot be released expires
            self._folder.release(self._writer_rows, self._name)

    def _wait_for_work(self) -> bool:
        """Wait for work, at most `WRITER_INTERVAL_S`; return whether the link closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_work or self._closing, WRITER_INTERVAL_S)
            self._has_work = False
            return self._closing

    def _update_leases(self) -> None:
        """Renew or gain the leases and, in the same transaction, remove acknowledged messages."""
        taken = dict(self._last_delivered)
        with self._changed:
            acks = dict(self._acks)
        if not taken or (taken == self._leases and not acks and time.monotonic() < self._renew_at):
            return
        with transaction(self._writer_rows):
            leases = {queue: taken[queue] for queue in taken if self._lease(queue, taken[queue])}
            self._folder.remove_rows(self._writer_rows, acks)
        self._leases = leases
        self._renew_at = time.monotonic() + self._folder.lease_seconds / 3
        self._folder.remove_bodies(file for file in acks.values() if file is not None)
        with self._changed:
            for tag in acks:
                del self._acks[tag]

    def _lease(self, queue: str, taken: int) -> bool:
        """Renew or gain the lease of a queue and return whether this link has it; BrokerError 208 when it was lost."""
        held = queue in self._leases
        gained = self._folder.lease(self._writer_rows, queue, self._owner, self._name, taken, held)
        if not gained:
            self._folder.require(self._writer_rows, queue)
        if held and not gained:
            sentence = f"{self._owner} lost queue {queue}: it was suspended, or started twice."
            raise BrokerError(208, sentence, "make sure that only one such worker runs; it may be restarted.")
        return gained

    def _send(self) -> set[str]:
        """Store the messages that their queues have room for, oldest first; return the queues that are full."""
        with self._changed:
            batch = list(self._outbox)
        if not batch:
            return set()
        self._folder.require_room()
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        fitting, full = self._take_fitting(batch)
        large = [message for message in fitting if message.size > INLINE_BYTES_MAX and message.file is None]
        for message in large:
            message.file = self._folder.write_body(message.body)
        if large:
            self._folder.sync_bodies()
        with transaction(self._writer_rows):
            # Again, since another publisher may have filled a queue while the files were written.
            stored, filled = self._take_fitting(fitting)
            self._folder.insert(self._writer_rows, [message.row() for message in stored])
        sent = set(stored)
        with self._changed:
            self._outbox = [message for message in self._outbox if message not in sent]
            self._events += [Confirmed(message.message_id) for message in stored]
            self._has_work = self._has_work or not full
            self._changed.notify_all()
            if all(message.file is None for message in self._outbox):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        time.sleep(0.001)  # SQLite has no fair queue for its lock: give other writers a chance
        return full | filled

    def _take_fitting(self, batch: list[_OutgoingMessage]) -> tuple[list[_OutgoingMessage], set[str]]:
        """Return the oldest messages that fit into their queues and one transaction, and the queues that are full."""
        room: dict[str, float] = {}
        fitting: list[_OutgoingMessage] = []
        full: set[str] = set()
        size = 0
        for message in batch:
            name = message.queue.name
            if name not in room:
                room[name] = self._room(message.queue)
            if message.size > room[name]:
                full.add(name)
                room[name] = -1  # a smaller message must not overtake it
                continue
            size += message.size
            if fitting and size > TRANSACTION_BYTES_MAX:
                break
            room[name] -= message.size
            fitting.append(message)
        return fitting, full

    def _room(self, queue: Queue) -> float:
        """Return the bytes that `queue` has room for."""
        self._folder.require(self._writer_rows, queue.name)
        waiting = self._folder.waiting(self._writer_rows, queue.name) if queue.limit_bytes is not None else None
        return math.inf if queue.limit_bytes is None or waiting is None else queue.limit_bytes - waiting[1]

    def _report(self, reason: str | None) -> None:
        """Report when the link becomes blocked, for a reason, and when it no longer is."""
        with self._changed:
            if self._is_blocked is (reason is None):
                self._is_blocked = reason is not None
                self._events.append(Unblocked() if reason is None else Blocked(reason))
                self._changed.notify_all()

    def _fail(self, error: BrokerError) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()
