"""Tries single things at a RabbitMQ and leaves nothing behind, for `nightsplit doctor`."""

from collections.abc import Callable
from typing import Any

import pika
from pika import exceptions

from nightsplit.broker.rabbitmq.address import connected, read_addresses
from nightsplit.broker.rabbitmq.errors import permanent_error
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Queue

PATIENCE_S = 10.0
BLOCKED_S = 5.0
"""How long a broker may block publishing before it counts as an alarm."""

NOWHERE = "doctor"
"""A routing key that leads to no queue: what is published with it comes back."""


class Probe:
    """One user at one broker.

    Args:
        url: as `nightsplit.broker.rabbitmq.broker.RabbitBroker` takes it.
        credentials: as there.

    Raises:
        BrokerError: 201 the address cannot be read.
        ConfigError: 113 when a file of `credentials` cannot be used.
    """

    def __init__(self, url: str, credentials: Credentials) -> None:
        self._addresses = read_addresses(url, 30, credentials)
        for parameters in self._addresses:
            parameters.blocked_connection_timeout = BLOCKED_S
        self.verifies_users = self._addresses[0].ssl_options is not None

    def may_publish(self, exchange: str) -> bool:
        """Whether the broker lets a message into `exchange`; it reaches no queue.

        Raises:
            BrokerError: 201, 202, 209.
        """
        return self._permits(lambda channel: self._publish(channel, exchange, 1))

    def may_read(self, queue: Queue) -> bool:
        """Whether the broker lets anybody read `queue`; what it gives goes back at once. Raises as `may_publish`."""
        return self._permits(lambda channel: channel.basic_get(queue.name))

    def may_create(self, name: str) -> bool:
        """Whether the broker lets a queue `name` be created; it is gone at once. Raises as `may_publish`."""
        return self._permits(lambda channel: channel.queue_declare(name, exclusive=True, auto_delete=True))

    def send(self, queue: Queue, size: int) -> None:
        """Send `size` bytes as far as the exchange of `queue`.

        Raises:
            BrokerError: 201, 202, 203 too large for this broker, 209 it takes nothing now, 205 no such exchange.
        """
        with connected(self._addresses, PATIENCE_S) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            try:
                self._publish(channel, queue.exchange, size)
            except exceptions.UnroutableError:
                return
            except exceptions.ConnectionBlockedTimeout:
                raise _blocked() from None
            except exceptions.ChannelClosedByBroker as error:
                raise permanent_error(error, self._addresses[0]) or error from None

    def _publish(self, channel: Any, exchange: str, size: int) -> None:
        user = self._addresses[0].credentials.username if self.verifies_users else None
        channel.basic_publish(exchange, NOWHERE, bytes(size), pika.BasicProperties(user_id=user), mandatory=True)

    def _permits(self, act: Callable[[Any], object]) -> bool:
        with connected(self._addresses, PATIENCE_S) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            try:
                act(channel)
            except exceptions.UnroutableError:
                return True
            except exceptions.ConnectionBlockedTimeout:
                raise _blocked() from None
            except exceptions.ChannelClosedByBroker as refusal:
                return bool(refusal.reply_code != 403)  # 404, 405: it was let in, and met something else
            return True


def _blocked() -> BrokerError:
    return BrokerError(
        209, "the broker blocks publishing: memory or disk alarm.", "make room at the broker; its log names the alarm."
    )
