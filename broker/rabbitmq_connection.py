"""Connections to RabbitMQ that come back by themselves. The only module that imports pika.

Everything here but `connected` belongs to a link's I/O thread; see the drawing in `broker.rabbitmq`.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pika
from pika import exceptions
from pika.adapters.select_connection import IOLoop, SelectConnection
from pika.adapters.utils import io_services_utils

from broker.base import Confirmed, Delivery, Queue
from broker.outbox import Message, Outbox, Pauses
from broker.rabbitmq_link import Inbox
from broker.rabbitmq_terms import lasting, line_down, unreachable
from shared.errors import BrokerError

__all__ = ["ChannelRefused", "Consuming", "IOLoop", "Publishing", "tune_process"]

MISSING_S = 120.0
"""How long a queue may be missing: nodes of a cluster that lost sight of each other find together again."""

FORGET_MISSING_S = 60.0
"""Longer than between two attempts. What was missing earlier than that has been there meanwhile."""

RECEIVE_BYTES = 128 * 2**10
"""What pika reads at a time: the size of an AMQP frame."""

ChannelRefused = exceptions.ChannelClosedByBroker


def tune_process() -> None:
    """Settings of the process that this transport needs."""
    # A worker in pure Python code gives the interpreter away every 5 ms by default, and the I/O
    # thread needs it for every frame of 128 KB: measured 46 MB/s, against 165 MB/s with 0.5 ms.
    sys.setswitchinterval(0.0005)
    # pika reads 4 KB at a time and copies what it has of a frame each time: 3 times slower.
    if hasattr(io_services_utils._AsyncTransportBase, "_MAX_RECV_BYTES"):
        io_services_utils._AsyncTransportBase._MAX_RECV_BYTES = RECEIVE_BYTES
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # failures are reported as events and errors


class _Connection(ABC):
    """One connection with one channel, opened again whenever it is lost.

        connect ─▶ _on_open ─▶ _prepare (subclass) ─▶ _now_up ─ ─ ─ ┐
           ▲                                                        │ lost, or its channel closed
           └─── next host, pause ◀──── _on_end ◀────────────────────┘

    A closed channel closes its connection too: with a single way back, that way is well trodden.
    A new connection is opened only after the old one has reported its end.
    """

    role: str  # "publishing" or "consuming"

    def __init__(self, loop: Any, addresses: Sequence[Any], owner: str, inbox: Inbox) -> None:
        self.was_up = threading.Event()
        self.on_ended: Callable[[], None] = lambda: None
        self._loop = loop
        self._inbox = inbox
        self._addresses = deque(copy.copy(parameters) for parameters in addresses)
        for parameters in self._addresses:
            parameters.client_properties = {"connection_name": f"nightsplit {owner} {self.role}"}
        self._pauses = Pauses()
        self._connection: Any = None
        self._channel: Any = None  # None unless it may be used
        self._retry: Any = None
        self._why: BaseException | None = None  # what closed the channel; the connection ends after it
        self._last_error: BaseException | None = None
        self._renewing = False
        self._closing = False
        self._missing_first = self._missing_last = -math.inf

    @property
    def _parameters(self) -> Any:
        """Of the host whose turn it is."""
        return self._addresses[0]

    @property
    def _is_cluster(self) -> bool:
        return len(self._addresses) > 1

    @abstractmethod
    def _prepare(self, channel: Any) -> None:
        """Set up a fresh channel; ends in `_now_up`."""

    @abstractmethod
    def _lost(self) -> None:
        """Forget what was bound to the channel; the connection has ended."""

    @property
    def has_ended(self) -> bool:
        """Whether the connection is closed for good."""
        return self._closing and self._connection is None

    def unreachable(self) -> BrokerError:
        """The error for a broker that does not answer."""
        return unreachable(self._last_error, self._parameters)

    def connect(self) -> None:
        """Begin to connect, and go on until it works."""
        self._retry = self._why = None
        self._connection = SelectConnection(
            self._parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_end,
            on_close_callback=self._on_end,
            custom_ioloop=self._loop,
        )

    def close(self) -> None:
        """Close for good, in order where the broker takes part."""
        self._closing = True
        if self._retry is not None:
            self._loop.remove_timeout(self._retry)
        self._let_go()

    def abort(self) -> None:
        """Close for good without the broker, which may be away or not reading."""
        if self._connection is not None:
            # pika's public close() waits for the broker's answer.
            self._connection._terminate_stream(exceptions.ConnectionClosedByClient(200, "the broker is silent"))

    def _let_go(self) -> None:
        """Close the connection so that its unacknowledged deliveries are the next to be delivered.

        Of itself pika would cancel the consumers first. The broker then wakes a standby, and (seen
        with a quorum queue) gives it what follows, before our deliveries are back in their places.
        """
        if self._connection is not None and not (self._connection.is_closing or self._connection.is_closed):
            self._channel = None
            self._connection._channels.clear()
            self._connection.close()

    def _on_open(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        self._channel = channel
        self._prepare(channel)

    def _on_channel_closed(self, channel: Any, reason: BaseException) -> None:
        # The broker closes a channel alone when an acknowledgement is overdue, for example; the
        # connection would stay open then, and silent for ever.
        self._why = reason
        self._let_go()

    def _now_up(self) -> None:
        if time.monotonic() - self._missing_last > FORGET_MISSING_S:  # else it may be missing still
            self._pauses = Pauses()
        self.was_up.set()
        self._inbox.over(self.role)

    def _on_end(self, connection: Any, reason: BaseException) -> None:
        self._last_error = reason = self._why or reason
        self._connection = self._channel = None
        verdict = lasting(reason, self._parameters)
        if self._closing:
            self.on_ended()
        elif self._renewing:
            self._renewing = False
            self.connect()
        elif verdict is not None and not self._may_come_back(verdict):
            self._inbox.fail(verdict)
        else:
            self._inbox.trouble(self.role, line_down(reason, self._parameters))
            self._retry = self._loop.call_later(next(self._pauses), self._connect_to_next)
        self._lost()

    def _connect_to_next(self) -> None:
        self._addresses.rotate(-1)
        self.connect()

    def _may_come_back(self, verdict: BrokerError) -> bool:
        """Whether a queue is missing, not for long yet, in a cluster: its parts may lose sight of each other."""
        if verdict.number != 205 or not self._is_cluster or not self.was_up.is_set():
            return False
        now = time.monotonic()
        if now - self._missing_last > FORGET_MISSING_S:
            self._missing_first = now
        self._missing_last = now
        return now - self._missing_first < MISSING_S


class Publishing(_Connection):
    """Publishes with asynchronous confirms, and again whatever the broker did not take."""

    role = "publishing"

    def __init__(self, loop: Any, addresses: Sequence[Any], owner: str, inbox: Inbox) -> None:
        super().__init__(loop, addresses, owner, inbox)
        self._outbox = Outbox()
        self._user = self._parameters.credentials.username if self._parameters.ssl_options else None
        self._can_send = False

    def publish(self, message: Message) -> None:
        """Send `message` as soon as the broker takes it."""
        self._outbox.add(message)
        if self._may_send and not self._outbox.is_held(message.queue):
            self._send(message)

    @property
    def _may_send(self) -> bool:
        """Whether the broker reads, and the connection is not about to end."""
        return self._can_send and self._channel is not None

    def _prepare(self, channel: Any) -> None:
        self._connection.add_on_connection_blocked_callback(self._on_blocked)
        self._connection.add_on_connection_unblocked_callback(self._on_unblocked)
        channel.add_on_return_callback(self._on_returned)
        channel.confirm_delivery(self._on_settled, callback=lambda frame: self._on_confirming())

    def _on_confirming(self) -> None:
        self._now_up()
        self._can_send = True
        self._send_due()

    def _lost(self) -> None:
        self._can_send = False
        self._outbox.recall()
        self._inbox.over("alarm")  # a new connection is told again

    def _on_blocked(self, connection: Any, frame: Any) -> None:
        self._can_send = False  # the broker no longer reads: pika would only pile up copies
        self._inbox.trouble("alarm", f"the broker blocks publishing: memory or disk alarm ({frame.method.reason})")

    def _on_unblocked(self, connection: Any, frame: Any) -> None:
        self._can_send = self._channel is not None
        self._inbox.over("alarm")
        self._send_due()

    def _send_due(self) -> None:
        if self._may_send:
            for message in self._outbox.due():
                self._send(message)

    def _send(self, message: Message) -> None:
        self._outbox.sent(message)
        self._channel.basic_publish(
            message.queue.exchange,
            message.queue.key,
            message.body,
            pika.BasicProperties(
                message_id=message.message_id,
                headers=message.headers,
                delivery_mode=pika.DeliveryMode.Persistent.value,
                user_id=self._user,
                content_type="application/octet-stream",
            ),
            mandatory=True,  # without it a message to a missing queue vanishes, and is confirmed
        )

    def _on_returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        # The broker confirms it next, which must not be heard: on a new channel it is offered again.
        where = f"exchange {method.exchange}, key {method.routing_key}"
        self._on_channel_closed(channel, ChannelRefused(404, f"{properties.message_id} reaches no queue ({where})"))

    def _on_settled(self, frame: Any) -> None:
        if self._channel is None:
            return
        accepted = isinstance(frame.method, pika.spec.Basic.Ack)
        for message in self._outbox.settle(frame.method.delivery_tag, frame.method.multiple):
            if accepted:
                self._accepted(message)
            else:
                self._refused(message)

    def _accepted(self, message: Message) -> None:
        was_held = self._outbox.is_held(message.queue)
        is_released = self._outbox.taken(message)
        self._inbox.events.put(Confirmed(message.message_id))
        if is_released:
            self._inbox.over(message.queue.name)
        if was_held:
            self._send_due()

    def _refused(self, message: Message) -> None:
        # The queue is full, or has no leader. Offered one at a time, the messages that wait keep their order.
        queue = message.queue
        reason = f"queue {queue.name} is full (limit: {queue.limit_bytes} bytes)"
        if self._is_cluster:
            reason += ", or waits for a new leader"
        self._inbox.trouble(queue.name, reason)
        pause = self._outbox.hold(queue)
        if pause is not None:
            self._loop.call_later(pause, partial(self._offer_again, queue))

    def _offer_again(self, queue: Queue) -> None:
        self._outbox.wake(queue)
        if self._is_cluster and self._channel is not None:
            # A channel that met a quorum queue without a leader refuses for it ever after (RabbitMQ 3.10).
            self._renewing = True
            self._let_go()
        else:
            self._send_due()


class Consuming(_Connection):
    """Receives deliveries. Each connection is an incarnation: what an earlier one delivered is void."""

    role = "consuming"

    def __init__(
        self, loop: Any, parameters: Any, owner: str, inbox: Inbox, consume: Sequence[Queue], prefetch: int
    ) -> None:
        super().__init__(loop, parameters, owner, inbox)
        self.queues = consume
        self.prefetch = prefetch
        self._owner = owner
        self._incarnation = object()  # unlike any other, also those of other links

    def is_stale(self, delivery: Delivery) -> bool:
        """Whether the broker has taken `delivery` back. Called by the worker."""
        return not (isinstance(delivery.tag, tuple) and delivery.tag[0] is self._incarnation)

    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge `delivery` unless it is void."""
        if self._channel is not None and not self.is_stale(delivery):
            assert isinstance(delivery.tag, tuple)
            self._channel.basic_ack(delivery.tag[1])

    def raise_prefetch(self, prefetch: int) -> None:
        """Consume anew, since the broker fixes a consumer's prefetch when it begins."""
        self.prefetch = prefetch
        if self._channel is not None:
            self._renewing = True
            self._let_go()

    def _prepare(self, channel: Any) -> None:
        def consuming(frame: Any) -> None:
            waited_for.discard(frame.method.consumer_tag)
            if not waited_for:
                self._now_up()

        channel.add_on_cancel_callback(self._on_cancelled)
        channel.basic_qos(prefetch_count=self.prefetch)  # holds for each consumer begun after it
        waited_for = {f"{self._owner} {queue.name}" for queue in self.queues}
        for queue in self.queues:
            channel.basic_consume(
                queue.name,
                partial(self._on_delivery, queue.name),
                consumer_tag=f"{self._owner} {queue.name}",
                callback=consuming,
            )

    def _lost(self) -> None:
        self._incarnation = object()

    def _on_cancelled(self, frame: Any) -> None:
        # The queue was deleted or its node went away. Consuming anew finds out which.
        self._on_channel_closed(self._channel, ConnectionError("the broker cancelled the consumer"))

    def _on_delivery(self, queue: str, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        # The broker adds headers of other types to dead letters.
        headers = {key: value for key, value in (properties.headers or {}).items() if isinstance(value, str)}
        tag = (self._incarnation, method.delivery_tag)
        user = properties.user_id or "" if self._parameters.ssl_options else None
        delivery = Delivery(queue, properties.message_id or "", body, headers, method.redelivered, tag, user)
        self._inbox.events.put(delivery)
