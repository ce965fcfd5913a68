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
from nightsplit.shared.credentials import Credentials
from nightsplit.shared.errors import BrokerError


def read_addresses(url: str, heartbeat: int, credentials: Credentials) -> list[Any]:
    """Return pika's parameters for each host of `amqp://user:password@host:port,host:port/vhost`.

    Raises:
        BrokerError: 201 the address cannot be read.
        ConfigError: 113 a file of `credentials` cannot be used.
    """
    try:
        # By hand: Python's urlsplit accepts several hosts only if none is an IPv6 address.
        scheme, _, rest = url.partition("://")
        authority, slash, path = rest.partition("/")
        login, at, hosts = authority.rpartition("@")
        if at and ":" not in login:
            login += ":"  # pika fails without a password, which may be in a file
        addresses = [pika.URLParameters(f"{scheme}://{login}{at}{host}{slash}{path}") for host in hosts.split(",")]
    except Exception as error:  # any error of the parser; its text may show a part of the password
        sentence = f"the broker's address cannot be read ({type(error).__name__})."
        raise BrokerError(201, sentence, "write amqp://user:password@host:5672/vhost.") from None
    secret = credentials.secret()
    for parameters in addresses:
        if secret is not None:
            parameters.credentials = pika.PlainCredentials(parameters.credentials.username, secret)
        if parameters.ssl_options is not None:
            parameters.ssl_options = pika.SSLOptions(credentials.tls(), parameters.host)
        parameters.heartbeat = heartbeat
        parameters.blocked_connection_timeout = None  # an alarm may last all night
        parameters.socket_timeout = 5
        parameters.stack_timeout = 10
    return addresses


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
