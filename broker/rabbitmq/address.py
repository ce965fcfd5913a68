"""Addresses of a RabbitMQ server or cluster, and short-lived connections to it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pika
from pika import exceptions

from nightsplit.broker.rabbitmq.errors import permanent_error, unreachable
from nightsplit.broker.rabbitmq.outbox import backoff
from nightsplit.broker.rabbitmq.version import version_refused
from nightsplit.shared.address import read_address
from nightsplit.shared.credentials import Credentials

GUEST = "guest"
"""User of a new RabbitMQ server, with its name as password, which may connect from the same machine alone."""


def read_addresses(url: str, heartbeat: int, credentials: Credentials) -> list[Any]:
    """Return pika's parameters for each host of `amqp://user:password@host:port,host:port/vhost`.

    Raises:
        ConfigError: 107 the address cannot be used, 111 it is an unencrypted one of another machine, 113 a file
            of `credentials` cannot be used.
    """
    address = read_address(url)
    user = address.user or GUEST
    password = credentials.secret() or address.password or (GUEST if user == GUEST else "")
    tls = credentials.tls() if address.is_encrypted else None
    return [
        pika.ConnectionParameters(
            host, port, address.path or "/", pika.PlainCredentials(user, password),
            ssl_options=tls and pika.SSLOptions(tls, host),
            heartbeat=heartbeat,
            blocked_connection_timeout=None,  # an alarm may last all night
            socket_timeout=5,
            stack_timeout=10,
        )
        for host, port in address.places
    ]  # fmt: skip


@contextmanager
def connected(addresses: Sequence[Any], seconds: float) -> Iterator[Any]:
    """Open a connection of the calling thread to the first of `addresses` that answers, for the block.

    Each is tried at least once, and all of them until `seconds` are over. Failures become BrokerError, 213 where the
    version of the server cannot be used.
    """
    parameters, connection = _connect(addresses, seconds)
    try:
        if refusal := version_refused(server_properties(connection), f"{parameters.host}:{parameters.port}"):
            raise refusal
        yield connection
    except (exceptions.AMQPError, OSError) as error:
        raise permanent_error(error, parameters) or unreachable(error, parameters) from None
    finally:
        if connection.is_open:
            with suppress(exceptions.AMQPError, OSError):
                connection.close()


def server_properties(connection: Any) -> dict[str, Any]:
    """Return the properties in the server's greeting; pika's blocking connection does not publish them."""
    properties: dict[str, Any] = connection._impl.server_properties
    return properties


def _connect(addresses: Sequence[Any], seconds: float) -> tuple[Any, Any]:
    """Return the address that answers, and a connection to it."""
    pauses, deadline = backoff(), time.monotonic() + seconds
    while True:
        for parameters in addresses:
            try:
                return parameters, pika.BlockingConnection(parameters)
            except (exceptions.AMQPError, OSError) as error:
                if permanent := permanent_error(error, parameters):
                    raise permanent from None
                failure = unreachable(error, parameters)
            time.sleep(next(pauses))
        if time.monotonic() > deadline:
            raise failure
