"""The worker's side of a link to RabbitMQ; see the drawing in `nightsplit.broker.rabbitmq.broker`."""

import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from queue import Empty
from typing import Any

from nightsplit.broker.rabbitmq.consumer import Consumer
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.broker.rabbitmq.outbox import OutgoingMessage
from nightsplit.broker.rabbitmq.publisher import Publisher
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Confirmed, Delivery, Event, Link, Queue

GOODBYE_S = 1.0
"""How long a closing link waits for the broker to take leave."""


class RabbitLink(Link):
    """The worker's side: hands everything to the I/O thread, and takes events out of the inbox."""

    def __init__(
        self, loop: Any, inbox: Inbox, publishing: Publisher, consuming: Consumer, max_message_bytes: int, owner: str
    ) -> None:
        self._loop = loop
        self._inbox = inbox
        self._publishing = publishing
        self._consuming = consuming
        self._connections = [publishing, consuming] if consuming.queues else [publishing]
        self._max_message_bytes = max_message_bytes
        self._prefetch = consuming.prefetch
        self._unconfirmed: set[str] = set()
        self._stopped = False
        for connection in self._connections:
            connection.on_ended = self._stop_when_ended
            loop.add_callback_threadsafe(connection.connect)
        self._thread = threading.Thread(target=self._run, name=f"rabbitmq {owner}", daemon=True)
        self._thread.start()

    def wait_until_up(self, timeout: float) -> None:
        """Return when both connections are up; raise the BrokerError that tells why they are not."""
        deadline = time.monotonic() + timeout
        for connection in self._connections:
            while not connection.was_up.wait(0.02):
                self._inbox.raise_failure()
                if time.monotonic() > deadline:
                    raise connection.unreachable()

    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        """Hand a message over; see `Link.publish`. The only copy of the body here is made by joining it.

        Raises:
            BrokerError: 203 too large; also what no retry can mend, for an earlier message perhaps.
        """
        self._inbox.raise_failure()
        size = sum(memoryview(piece).nbytes for piece in body)
        if size > self._max_message_bytes and queue.dead_key is not None:
            raise BrokerError(
                203,
                f"{message_id} has {size} bytes, the limit is {self._max_message_bytes}.",
                "lower run.batch_size or choose a smaller codec.",
            )
        self._unconfirmed.add(message_id)
        message = OutgoingMessage(queue, message_id, b"".join(body), dict(headers))
        self._loop.add_callback_threadsafe(partial(self._publishing.publish, message))

    def receive(self, timeout: float) -> Event | None:
        """The next event, waiting up to `timeout` seconds; None when there was none.

        Raises:
            BrokerError: what no retry can mend; the link stays unusable.
        """
        deadline = time.monotonic() + timeout
        while True:
            self._inbox.raise_failure()
            try:
                event = self._inbox.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return None
            if isinstance(event, Delivery) and self._consuming.is_stale(event):
                continue  # its connection was lost while it waited here; it comes again
            if isinstance(event, Confirmed):
                self._unconfirmed.discard(event.message_id)
            if event is not None:
                return event

    def acknowledge(self, delivery: Delivery) -> None:
        """Let the broker forget a delivery; one from before a reconnect is ignored."""
        self._loop.add_callback_threadsafe(partial(self._consuming.acknowledge, delivery))

    @property
    def unconfirmed(self) -> frozenset[str]:
        """Ids of messages whose `Confirmed` the worker has not received yet."""
        return frozenset(self._unconfirmed)

    @property
    def prefetch(self) -> int:
        """Deliveries per queue that may be unacknowledged at the same time."""
        return self._prefetch

    def raise_prefetch(self, prefetch: int) -> None:
        """Allow more; a standby may get the queues in that moment, as after a lost connection."""
        if prefetch > self._prefetch:
            self._prefetch = prefetch
            self._loop.add_callback_threadsafe(partial(self._consuming.raise_prefetch, prefetch))

    def close(self) -> None:
        """Let go, within about a second even when the broker is away."""
        self._loop.add_callback_threadsafe(self._say_goodbye)
        self._thread.join()

    # What follows runs on the I/O thread.

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._loop.start()
            except Exception as error:
                # A fault of ours or of pika: the worker hears of it; the loop goes on so that it can close.
                sentence = f"the link failed unexpectedly: {error!r}."
                self._inbox.fail(BrokerError(201, sentence, "start the worker again, and report this."))
        self._loop.close()

    def _say_goodbye(self) -> None:
        for connection in self._connections:
            connection.close()
        self._loop.call_later(GOODBYE_S, self._leave)
        self._stop_when_ended()

    def _leave(self) -> None:
        self._loop.call_later(GOODBYE_S, self._stop)  # `close` returns, whatever state pika is in
        for connection in self._connections:
            connection.abort("the broker is silent")

    def _stop_when_ended(self) -> None:
        if all(connection.has_ended for connection in self._connections):
            self._stop()

    def _stop(self) -> None:
        self._stopped = True
        self._loop.stop()
