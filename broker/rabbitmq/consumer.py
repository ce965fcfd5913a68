"""The half of a link to RabbitMQ that consumes; see the drawing in `nightsplit.broker.rabbitmq.broker`."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from nightsplit.broker.rabbitmq.connection import Connection
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.shared.transport import Delivery, Queue


class Consumer(Connection):
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
        self._unacknowledged: Counter[str] = Counter()
        self._asked_about: set[str] = set()
        """Queues that the broker was asked about in a silence, and which seem to be forgotten."""

    def is_stale(self, delivery: Delivery) -> bool:
        """Whether the broker has taken `delivery` back. Called by the worker."""
        return not (isinstance(delivery.tag, tuple) and delivery.tag[0] is self._incarnation)

    def acknowledge(self, delivery: Delivery) -> None:
        """Acknowledge `delivery` unless it is void."""
        if self._channel is not None and not self.is_stale(delivery):
            assert isinstance(delivery.tag, tuple)
            self._heard()
            self._unacknowledged[delivery.queue] -= 1
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

    def _heard(self) -> None:
        super()._heard()
        self._asked_about.clear()

    def _is_owed(self) -> bool:
        # At the first look it asks; at the next one, a queue that has something is owed, or one that did not answer.
        if self._asked_about:
            return True
        for queue in self.queues:
            self._asked_about.add(queue.name)
            self._channel.queue_declare(queue.name, passive=True, callback=self._on_depth)
        return False

    def _on_depth(self, frame: Any) -> None:
        queue = frame.method.queue
        if not frame.method.message_count or self._unacknowledged[queue] >= self.prefetch:
            self._asked_about.discard(queue)

    def _lost(self) -> None:
        self._incarnation = object()
        self._unacknowledged.clear()

    def _on_cancelled(self, frame: Any) -> None:
        # The queue was deleted or its node went away. Consumer anew finds out which.
        self._on_channel_closed(self._channel, ConnectionError("the broker cancelled the consumer"))

    def _on_delivery(self, queue: str, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        # The broker adds headers of other types to dead letters.
        headers = {key: value for key, value in (properties.headers or {}).items() if isinstance(value, str)}
        self._heard()
        self._unacknowledged[queue] += 1
        tag = (self._incarnation, method.delivery_tag)
        user = properties.user_id or "" if self._parameters.ssl_options else None
        delivery = Delivery(queue, properties.message_id or "", body, headers, method.redelivered, tag, user)
        self._inbox.events.put(delivery)
