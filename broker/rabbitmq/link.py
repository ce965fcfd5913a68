"""Link to RabbitMQ; see the drawing in `nightsplit.broker.rabbitmq.broker`."""

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from queue import Empty
from typing import Any

from typing_extensions import override

from nightsplit.broker.rabbitmq.consumer import Consumer
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.broker.rabbitmq.outbox import OutgoingMessage
from nightsplit.broker.rabbitmq.publisher import Publisher
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Confirmed, Delivery, Event, Link, Queue, check_size

CLOSE_TIMEOUT_S = 2.0
"""Seconds that a closing link waits for the broker, and then for connections that it aborts."""


class RabbitLink(Link):
    """Link that passes calls to the I/O thread and takes events from the inbox."""

    def __init__(
        self, loop: Any, inbox: Inbox, publisher: Publisher, consumer: Consumer, max_message_bytes: int, owner: str
    ) -> None:
        self._loop = loop
        self._inbox = inbox
        self._publisher = publisher
        self._consumer = consumer
        self._connections = [publisher, consumer] if consumer.queues else [publisher]
        self._max_message_bytes = max_message_bytes
        self._prefetch = consumer.prefetch
        self._unconfirmed: set[str] = set()
        self._stopped = False
        for connection in self._connections:
            connection.on_ended = self._stop_when_ended
            loop.add_callback_threadsafe(connection.connect)
        self._thread = threading.Thread(target=self._run, name=f"rabbitmq {owner}", daemon=True)
        self._thread.start()

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until all connections are ready; raise the link's permanent error, or BrokerError 201 at the timeout."""
        deadline = time.monotonic() + timeout
        for connection in self._connections:
            while not connection.ready.wait(0.02):
                self._inbox.raise_failure()
                if time.monotonic() > deadline:
                    raise connection.unreachable()

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        """Hand a message to the I/O thread; BrokerError 203 if it is too large, or the error that ended the link."""
        self._inbox.raise_failure()
        check_size(queue, message_id, sum(memoryview(piece).nbytes for piece in body), self._max_message_bytes)
        self._unconfirmed.add(message_id)
        message = OutgoingMessage(queue, message_id, b"".join(body), dict(headers))  # the only copy of the body here
        self._loop.add_callback_threadsafe(partial(self._publisher.publish, message))

    @override
    def receive(self, timeout: float) -> Event | None:
        """Return the next event, or None after `timeout` seconds; a permanent error makes the link unusable."""
        deadline = time.monotonic() + timeout
        while True:
            self._inbox.raise_failure()
            try:
                event = self._inbox.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return None
            if isinstance(event, Delivery) and self._consumer.is_stale(event):
                continue  # its connection was lost while it waited here; it is delivered again
            if isinstance(event, Confirmed):
                self._unconfirmed.discard(event.message_id)
            if event is not None:  # else `Inbox.fail` has woken us: its error is raised next
                return event

    @override
    def acknowledge(self, delivery: Delivery) -> None:
        self._loop.add_callback_threadsafe(partial(self._consumer.acknowledge, delivery))

    @override
    def give_back(self, delivery: Delivery) -> None:
        self._loop.add_callback_threadsafe(partial(self._consumer.give_back, delivery))

    @property
    @override
    def unconfirmed(self) -> frozenset[str]:
        # An event in the inbox does not count yet: the worker has not received it.
        return frozenset(self._unconfirmed)

    @property
    @override
    def prefetch(self) -> int:
        return self._prefetch

    @override
    def raise_prefetch(self, prefetch: int) -> None:
        # The consumer reconnects for it, and a standby may take over the queues meanwhile: never without need.
        if prefetch > self._prefetch:
            self._prefetch = prefetch
            self._loop.add_callback_threadsafe(partial(self._consumer.raise_prefetch, prefetch))

    @override
    def close(self) -> None:
        """Close the connections; return within about four seconds even when the broker is unreachable."""
        self._loop.add_callback_threadsafe(self._close_connections)
        self._thread.join()

    # On the I/O thread.

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._loop.start()
            except Exception as error:
                # A bug here or in pika: the worker gets the error; the loop goes on so that it can close.
                sentence = f"the link failed unexpectedly: {error!r}."
                self._inbox.fail(BrokerError(201, sentence, "start the worker again, and report this error."))
        self._loop.close()

    def _close_connections(self) -> None:
        for connection in self._connections:
            connection.close()
        self._loop.call_later(CLOSE_TIMEOUT_S, self._abort_connections)
        self._stop_when_ended()  # a connection that is down already does not report its end again

    def _abort_connections(self) -> None:
        self._loop.call_later(CLOSE_TIMEOUT_S, self._stop)  # so that `close` returns in any state of pika
        for connection in self._connections:
            connection.abort("the broker is silent")

    def _stop_when_ended(self) -> None:
        if all(connection.has_ended for connection in self._connections):
            self._stop()

    def _stop(self) -> None:
        self._stopped = True
        self._loop.stop()
