"""Brokers by the address in a worker's file."""

from pathlib import Path

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.shared.credentials import NO_CREDENTIALS, Credentials
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.transport import Broker


def open_broker(address: str, base: Path, max_message_bytes: int, credentials: Credentials = NO_CREDENTIALS) -> Broker:
    """Return the broker at "amqp://...", "amqps://..." or "embedded:folder", relative to the folder `base`.

    Raises:
        ConfigError: 107 unusable address, 111 unencrypted connection to another host, 113 unusable file
            of `credentials`.
    """
    scheme, _, rest = address.partition(":")
    if scheme == "embedded" and rest:
        return EmbeddedBroker(base / rest, max_message_bytes)
    if scheme in ("amqp", "amqps"):
        # Imported here, since the embedded broker works without pika.
        from nightsplit.broker.rabbitmq.broker import RabbitBroker

        return RabbitBroker(address, max_message_bytes, credentials=credentials)
    sentence = f'the broker\'s address has the unknown scheme "{scheme}".'
    raise ConfigError(107, sentence, 'write "embedded:folder" for one host, or "amqps://user@host:5671/vhost".')
