"""Checks of single operations at a RabbitMQ broker that leave nothing behind, for `nightsplit doctor`."""

from collections.abc import Callable
from typing import Any

import pika
from pika import exceptions

from nightsplit.broker.rabbitmq.address import connected, read_addresses, server_properties
from nightsplit.broker.rabbitmq.errors import arguments, is_of_other_type, permanent_error, unreachable
from nightsplit.broker.rabbitmq.version import needs_quorum_queues
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Queue

CONNECT_TIMEOUT_S = 10.0
BLOCKED_TIMEOUT_S = 5.0
"""Seconds after which a broker that blocks publishing is taken to have an alarm."""

UNROUTABLE_KEY = "doctor"
"""Routing key without a binding: a permitted message reaches no queue, and comes back as unroutable."""


class Probe:
    """Probe of the permissions of one user at one broker; raises the errors of `RabbitBroker`."""

    def __init__(self, url: str, credentials: Credentials) -> None:
        self._addresses = read_addresses(url, heartbeat=30, credentials=credentials)
        for parameters in self._addresses:
            parameters.blocked_connection_timeout = BLOCKED_TIMEOUT_S
        self.verifies_users = self._addresses[0].ssl_options is not None

    def server(self) -> tuple[str, str]:
        """Return product and version of the server; BrokerError 213 if it cannot be used."""
        with connected(self._addresses, CONNECT_TIMEOUT_S) as connection:
            properties = server_properties(connection)
            return str(properties.get("product")), str(properties.get("version"))

    def may_publish(self, exchange: str) -> bool:
        """Return whether the user may publish to `exchange`, without reaching a queue; BrokerError 201, 202, 209."""
        return self._permits(lambda channel: self._publish(channel, exchange, 1))

    def may_read(self, queue: Queue) -> bool:
        """Return whether the user may read `queue`; a message that it takes is put back at once."""
        return self._permits(lambda channel: channel.basic_get(queue.name))

    def may_create(self, name: str) -> bool:
        """Return whether the user may create a queue `name`; it is deleted at once."""
        return self._permits(lambda channel: channel.queue_declare(name, exclusive=True, auto_delete=True))

    def send(self, queue: Queue, size: int) -> None:
        """Send `size` bytes to the exchange of `queue`; BrokerError 201-203, 205, or 209 if it blocks publishing."""
        refusal = self._refusal(lambda channel: self._publish(channel, queue.exchange, size))
        if refusal is not None:
            raise permanent_error(refusal, self._addresses[0]) or unreachable(refusal, self._addresses[0])

    def loses_at_power_cut(self, queue: Queue) -> bool:
        """Return whether `queue` loses confirmed messages when its host loses power; False if it does not exist.

        The user needs the right to configure it.
        """

        def expect_quorum(channel: Any) -> None:
            if needs_quorum_queues(server_properties(channel.connection)):
                channel.queue_declare(queue.name, passive=True)
                channel.queue_declare(queue.name, durable=True, arguments=arguments(queue, quorum=True))

        return is_of_other_type(self._refusal(expect_quorum))

    def _publish(self, channel: Any, exchange: str, size: int) -> None:
        user = self._addresses[0].credentials.username if self.verifies_users else None
        channel.basic_publish(exchange, UNROUTABLE_KEY, bytes(size), pika.BasicProperties(user_id=user), mandatory=True)

    def _permits(self, operation: Callable[[Any], object]) -> bool:
        """Return whether the user may perform an operation on a channel."""
        refusal = self._refusal(operation)
        return refusal is None or refusal.reply_code != 403  # 404, 405: permitted, and failed for another reason

    def _refusal(self, operation: Callable[[Any], object]) -> Any:
        """Perform an operation on a channel; return the ChannelClosedByBroker that refuses it, or None."""
        with connected(self._addresses, CONNECT_TIMEOUT_S) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            try:
                operation(channel)
            except exceptions.UnroutableError:  # accepted, and returned since no queue is bound: a success
                return None
            except exceptions.ConnectionBlockedTimeout:
                sentence = "the broker blocks publishing: memory or disk alarm."
                remedy = "free memory or disk space at the broker; its log names the alarm."
                raise BrokerError(209, sentence, remedy) from None
            except exceptions.ChannelClosedByBroker as refusal:
                return refusal
            return None
