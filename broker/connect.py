"""From an address in a worker's file to a broker."""

from pathlib import Path

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.shared.credentials import NO_CREDENTIALS, Credentials, expect_private
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.transport import Broker


def open_broker(address: str, base: Path, max_message_bytes: int, credentials: Credentials = NO_CREDENTIALS) -> Broker:
    """The broker at "amqp://...", "amqps://..." or "embedded:folder".

    Args:
        address: as in site.toml and server.toml.
        base: folder to which a relative folder belongs.
        max_message_bytes: largest message.
        credentials: for RabbitMQ.

    Raises:
        ConfigError: 107 for any other address, 111 for a plain line to another machine, 113 for a file
            of `credentials`.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "embedded" and rest:
        return EmbeddedBroker(base / rest, max_message_bytes)
    if scheme in ("amqp", "amqps"):
        # Imported here, since the embedded broker works where pika is not wanted.
        from nightsplit.broker.rabbitmq.broker import RabbitBroker

        expect_private(address)
        return RabbitBroker(address, max_message_bytes, credentials=credentials)
    raise ConfigError(
        107,
        f'the broker\'s address has the unknown scheme "{scheme}".',
        'write "embedded:folder" for one host, or "amqps://user@host:5671/vhost".',
    )
