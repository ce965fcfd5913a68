"""Durable broker in a folder, for the processes of one host; there is no service to install.

A queue has one consumer at a time, the link that holds its lease. Since one consumer takes the
messages in order, a new one simply starts at the oldest; a message needs no state of its own.
Leases run on the monotonic clock, which the processes of a host share: setting the wall clock
changes nothing.

For local disks only: SQLite's locks and shared memory are not reliable on network file systems.
"""

from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from typing_extensions import override

from nightsplit.broker.embedded.link import EmbeddedLink
from nightsplit.broker.embedded.storage import Folder
from nightsplit.shared.storage.sqlite import broker_errors, transaction
from nightsplit.shared.transport import Broker, Link, Queue


class EmbeddedBroker(Broker):
    """Broker in a folder that the processes of one host share. It keeps no file open.

    Args:
        folder: on a local disk; created when missing.
        max_message_bytes: size of the largest body.
        lease_seconds: time after which a queue is taken from a silent consumer.
    """

    def __init__(self, folder: Path, max_message_bytes: int = 16 * 2**20, lease_seconds: float = 10.0) -> None:
        self._folder = Folder(folder, lease_seconds)
        self._max_message_bytes = max_message_bytes

    @override
    def declare(self, queues: Iterable[Queue]) -> None:
        """Create queues and remove body files left by crashes; BrokerError 201 unusable folder, 204 other settings."""
        with broker_errors(201, self._folder.path), closing(self._folder.open()) as rows:
            with transaction(rows):
                for queue in queues:
                    self._folder.declare(rows, queue)
            self._folder.remove_orphans(rows)

    @override
    def link(self, consume: Sequence[Queue], prefetch: int, owner: str) -> Link:
        """Open a link; BrokerError 201 the folder cannot be used, 205 a queue does not exist."""
        return EmbeddedLink(self._folder, self._max_message_bytes, consume, prefetch, owner)

    @override
    def depth(self, queue: Queue) -> int | None:
        # Deliveries that the consumer's writer has not recorded yet are counted too.
        with broker_errors(201, self._folder.path), closing(self._folder.open()) as rows:
            waiting = self._folder.waiting(rows, queue.name)
            return None if waiting is None else waiting[0]

    @override
    def is_consumed(self, queue: Queue) -> bool:
        with broker_errors(201, self._folder.path), closing(self._folder.open()) as rows:
            return self._folder.is_leased(rows, queue.name)

    @override
    def delete(self, queues: Iterable[Queue]) -> None:
        files: list[str] = []
        with broker_errors(201, self._folder.path), closing(self._folder.open()) as rows:
            with transaction(rows):
                for queue in queues:
                    files += self._folder.delete(rows, queue.name)
            self._folder.remove_bodies(files)
