"""Publishing connection of a link to RabbitMQ; see the drawing in `nightsplit.broker.rabbitmq.broker`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pika
from typing_extensions import override

from nightsplit.broker.rabbitmq.connection import ChannelRefused, Connection
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.broker.rabbitmq.outbox import Outbox, OutgoingMessage
from nightsplit.shared.transport import Confirmed, Queue


class Publisher(Connection):
    """Connection that publishes with asynchronous confirms, and retries messages that the broker refused."""

    role = "publishing"

    def __init__(self, loop: Any, addresses: Sequence[Any], owner: str, inbox: Inbox) -> None:
        super().__init__(loop, addresses, owner, inbox)
        self._outbox = Outbox()
        self._user = self._parameters.credentials.username if self._parameters.ssl_options else None
        self._is_flowing = False

    def publish(self, message: OutgoingMessage) -> None:
        """Send `message` as soon as the broker accepts it."""
        self._outbox.add(message)
        if self._can_send and not self._outbox.is_held(message.queue):
            self._send(message)

    @property
    def _can_send(self) -> bool:
        """True while the broker reads and the connection is not about to end."""
        return self._is_flowing and self._channel is not None

    @override
    def _prepare(self, channel: Any) -> None:
        self._connection.add_on_connection_blocked_callback(self._on_blocked)
        self._connection.add_on_connection_unblocked_callback(self._on_unblocked)
        channel.add_on_return_callback(self._on_returned)
        channel.confirm_delivery(self._on_settled, callback=lambda frame: self._on_confirms_on())

    def _on_confirms_on(self) -> None:
        self._on_ready()
        self._is_flowing = True
        self._send_due()

    @override
    def _is_reply_due(self) -> bool:
        return self._is_flowing and self._outbox.has_in_flight

    @override
    def _ask(self, side_channel: Any) -> set[str]:
        side_channel.close()
        return {"a confirm"}

    @override
    def _on_lost(self) -> None:
        self._is_flowing = False
        self._outbox.reset()
        self._inbox.unblock("alarm")  # the broker repeats it on a new connection

    def _on_blocked(self, connection: Any, frame: Any) -> None:
        self._is_flowing = False  # the broker no longer reads: pika would only accumulate copies
        self._inbox.block("alarm", f"the broker blocks publishing: memory or disk alarm ({frame.method.reason})")

    def _on_unblocked(self, connection: Any, frame: Any) -> None:
        self._is_flowing = self._channel is not None
        self._inbox.unblock("alarm")
        self._send_due()

    def _send_due(self) -> None:
        if self._can_send:
            for message in self._outbox.due():
                self._send(message)

    def _send(self, message: OutgoingMessage) -> None:
        if not self._outbox.has_in_flight:
            self._note_traffic()  # the confirm is owed from now on
        self._outbox.mark_sent(message)
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
            mandatory=True,  # without it a message to a missing queue is dropped, and confirmed
        )

    def _on_returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        # The broker confirms it next, which must be ignored: on a new channel it is published again.
        route = f"exchange {method.exchange}, key {method.routing_key}"
        self._on_channel_closed(channel, ChannelRefused(404, f"{properties.message_id} reaches no queue ({route})"))

    def _on_settled(self, frame: Any) -> None:
        if self._channel is None:
            return
        self._note_traffic()
        accepted = isinstance(frame.method, pika.spec.Basic.Ack)
        for message in self._outbox.settle(frame.method.delivery_tag, frame.method.multiple):
            if accepted:
                self._on_accepted(message)
            else:
                self._on_refused(message)

    def _on_accepted(self, message: OutgoingMessage) -> None:
        was_held = self._outbox.is_held(message.queue)
        is_released = self._outbox.confirm(message)
        self._inbox.events.put(Confirmed(message.message_id))
        if is_released:
            self._inbox.unblock(message.queue.name)
        if was_held:
            self._send_due()

    def _on_refused(self, message: OutgoingMessage) -> None:
        # The queue is full, or has no leader. Sent one at a time, the waiting messages keep their order.
        queue = message.queue
        reason = f"queue {queue.name} is full (limit: {queue.limit_bytes} bytes)"
        if self._is_cluster:
            reason += ", or waits for a new leader"
        self._inbox.block(queue.name, reason)
        pause = self._outbox.hold(queue)
        if pause is not None:
            self._loop.call_later(pause, partial(self._resume, queue))

    def _resume(self, queue: Queue) -> None:
        self._outbox.resume(queue)
        if self._is_cluster and self._channel is not None:
            # After a quorum queue had no leader, its channel refuses every later message (RabbitMQ 3.10); and a node
            # that is cut off from the majority refuses all of them (4.3).
            self._addresses.rotate(-1)
            self._is_renewing = True
            self._disconnect()
        else:
            self._send_due()
