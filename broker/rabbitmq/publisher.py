"""The half of a link to RabbitMQ that publishes; see the drawing in `nightsplit.broker.rabbitmq.broker`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pika

from nightsplit.broker.rabbitmq.connection import ChannelRefused, Connection
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.broker.rabbitmq.outbox import Outbox, OutgoingMessage
from nightsplit.shared.transport import Confirmed, Queue


class Publisher(Connection):
    """Publishes with asynchronous confirms, and again whatever the broker did not take."""

    role = "publishing"

    def __init__(self, loop: Any, addresses: Sequence[Any], owner: str, inbox: Inbox) -> None:
        super().__init__(loop, addresses, owner, inbox)
        self._outbox = Outbox()
        self._user = self._parameters.credentials.username if self._parameters.ssl_options else None
        self._can_send = False

    def publish(self, message: OutgoingMessage) -> None:
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

    def _is_owed(self) -> bool:
        return self._can_send and self._outbox.is_under_way

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

    def _send(self, message: OutgoingMessage) -> None:
        self._heard()
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
        self._heard()
        accepted = isinstance(frame.method, pika.spec.Basic.Ack)
        for message in self._outbox.settle(frame.method.delivery_tag, frame.method.multiple):
            if accepted:
                self._accepted(message)
            else:
                self._refused(message)

    def _accepted(self, message: OutgoingMessage) -> None:
        was_held = self._outbox.is_held(message.queue)
        is_released = self._outbox.taken(message)
        self._inbox.events.put(Confirmed(message.message_id))
        if is_released:
            self._inbox.over(message.queue.name)
        if was_held:
            self._send_due()

    def _refused(self, message: OutgoingMessage) -> None:
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
