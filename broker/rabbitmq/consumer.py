"""Consuming connection of a link to RabbitMQ; see the drawing in `nightsplit.broker.rabbitmq.broker`."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from typing_extensions import override

from nightsplit.broker.rabbitmq.connection import Connection
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.shared.transport import Delivery, Queue


class Consumer(Connection):
    """Connection that receives deliveries. Those of an earlier incarnation, a lost connection, are stale."""

    role = "consuming"

    def __init__(
        self, loop: Any, parameters: Any, owner: str, inbox: Inbox, consume: Sequence[Queue], prefetch: int
    ) -> None:
        super().__init__(loop, parameters, owner, inbox)
        self.queues = consume
        self.prefetch = prefetch
        self._owner = owner
        self._incarnation = object()  # unlike any other, also those of other links
        self._unacknowledged: Counter[str] = Counter()

    def is_stale(self, delivery: Delivery) -> bool:
        """Return whether the broker has taken `delivery` back. Called by the worker's thread."""
        return not (isinstance(delivery.tag, tuple) and delivery.tag[0] is self._incarnation)

    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge `delivery` unless it is stale."""
        if (tag := self._settled(delivery)) is not None:
            self._channel.basic_ack(tag)

    def give_back(self, delivery: Delivery) -> None:
        """Return `delivery` to its queue unless it is stale; the broker delivers it again at once."""
        if (tag := self._settled(delivery)) is not None:
            self._channel.basic_reject(tag, requeue=True)

    def _settled(self, delivery: Delivery) -> int | None:
        """Count `delivery` as settled and return its tag at the broker; None if the broker has taken it back."""
        if self._channel is None or self.is_stale(delivery):
            return None
        assert isinstance(delivery.tag, tuple)
        self._unacknowledged[delivery.queue] -= 1
        tag: int = delivery.tag[1]
        return tag

    def raise_prefetch(self, prefetch: int) -> None:
        """Reconnect with another prefetch, since the broker fixes it when a consumer starts."""

        def reconnect() -> None:
            self._is_renewing = True
            self._disconnect()

        self.prefetch = prefetch
        if self._channel is not None:
            self._settle(reconnect)

    @override
    def close(self) -> None:
        self._is_closing = True
        self._settle(super().close)

    def _settle(self, then: Callable[[], None]) -> None:
        """Call `then` when the queues have applied the acknowledgements.

        The channel of a quorum queue keeps acknowledgements back while others are being replicated, and what it still
        keeps when it ends is lost. The start of another consumer is replicated after those that were not kept back,
        and its end after the rest. It receives nothing, because ours is the active one; to cancel that one would let a
        standby overtake the deliveries that we return.
        """
        channel = self._channel
        queues = list(self._unacknowledged) if channel is not None else []

        def settle_next(frame: Any = None) -> None:
            if queues:
                channel.basic_consume(queues.pop(), lambda *delivery: None, callback=on_started)
            else:
                then()

        def on_started(frame: Any) -> None:
            channel.basic_cancel(frame.method.consumer_tag, callback=settle_next)

        settle_next()

    @override
    def _prepare(self, channel: Any) -> None:
        def on_consuming(frame: Any) -> None:
            starting.discard(frame.method.consumer_tag)
            if not starting:
                self._on_ready()

        channel.add_on_cancel_callback(self._on_cancelled)
        channel.basic_qos(prefetch_count=self.prefetch)  # applies to every consumer started after it
        starting = {f"{self._owner} {queue.name}" for queue in self.queues}
        for queue in self.queues:
            tag, on_delivery = f"{self._owner} {queue.name}", partial(self._on_delivery, queue.name)
            channel.basic_consume(queue.name, on_delivery, consumer_tag=tag, callback=on_consuming)

    @override
    def _is_reply_due(self) -> bool:
        return True

    @override
    def _ask(self, side_channel: Any) -> set[str]:
        def on_depth(frame: Any) -> None:
            queue = frame.method.queue
            if not frame.method.message_count or self._unacknowledged[queue] >= self.prefetch:
                overdue.discard(queue)

        def on_started(frame: Any) -> None:
            overdue.discard(frame.method.consumer_tag)
            side_channel.close()

        overdue = {queue.name for queue in self.queues}
        for name in overdue:
            self._channel.queue_declare(name, passive=True, callback=on_depth)
        # A node without the majority still tells a depth, but it cannot replicate the start of another consumer.
        side_channel.basic_qos(prefetch_count=1)
        overdue.add(side_channel.basic_consume(self.queues[0].name, lambda *delivery: None, callback=on_started))
        return overdue

    @override
    def _on_lost(self) -> None:
        self._incarnation = object()
        self._unacknowledged.clear()

    def _on_cancelled(self, frame: Any) -> None:
        # Reconnecting finds out which. RabbitMQ 4.3 cancels for a late acknowledgement, earlier ones close the channel.
        reason = "the broker cancelled the consumer: the queue is away, or an acknowledgement is late"
        self._on_channel_closed(self._channel, ConnectionError(reason))

    def _on_delivery(self, queue: str, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        # The broker adds headers of other types to dead letters.
        headers = {key: value for key, value in (properties.headers or {}).items() if isinstance(value, str)}
        self._note_traffic()
        self._unacknowledged[queue] += 1
        tag = (self._incarnation, method.delivery_tag)
        user = properties.user_id or "" if self._parameters.ssl_options else None
        delivery = Delivery(queue, properties.message_id or "", body, headers, method.redelivered, tag, user)
        self._inbox.events.put(delivery)
