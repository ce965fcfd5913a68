"""From an address in a worker's file to a broker."""

from __future__ import annotations

from pathlib import Path

from broker.base import Broker
from broker.embedded import EmbeddedBroker
from shared.errors import ConfigError


def open_broker(address: str, base: Path, max_message_bytes: int) -> Broker:
    """The broker at "amqp://...", "amqps://..." or "embedded:folder".

    Args:
        address: as in site.toml and server.toml.
        base: folder to which a relative folder belongs.
        max_message_bytes: largest message.

    Raises:
        ConfigError: 107 for any other address.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "embedded" and rest:
        return EmbeddedBroker(base / rest, max_message_bytes)
    if scheme in ("amqp", "amqps"):
        # Imported here, since the embedded broker works where pika is not wanted.
        from broker.rabbitmq import RabbitBroker

        return RabbitBroker(address, max_message_bytes)
    raise ConfigError(
        107,
        f'the broker\'s address has the unknown scheme "{scheme}".',
        'write "embedded:folder" for one host, or "amqp://user:password@host:5672/vhost".',
    )
