"""RabbitMQ broker. `link` is the left column below; `publisher` and `consumer` are the right one.

    the worker's thread                       the link's I/O thread (one pika loop)
    ───────────────────                       ─────────────────────────────────────
    publish()      ──── add_callback ────▶    Publisher ══ connection 1 ══▶ exchange ─▶ queue
    acknowledge()  ──── add_callback ────▶    Consumer  ◀═ connection 2 ═══ queue
    receive()      ◀─────── Inbox ────────    Confirmed, Delivery, Blocked, Unblocked

Heartbeats go on while the worker computes, because another thread sends them. There are two
connections because a broker with an alarm stops reading from one that publishes, and the
acknowledgements must still get through: they drain the backlog that raised the alarm.
A worker that dies frees its queues when the broker sees its connection end: at once for a process,
after two heartbeats for a host or a network. A restart under the same name waits as long.

All state in the right column belongs to the I/O thread; the inbox is the only way back.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from typing_extensions import override

from nightsplit.broker.rabbitmq.address import connected, read_addresses, server_properties
from nightsplit.broker.rabbitmq.connection import ChannelRefused, IOLoop, tune_process
from nightsplit.broker.rabbitmq.consumer import Consumer
from nightsplit.broker.rabbitmq.errors import arguments, is_of_other_type, split_cluster
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.broker.rabbitmq.link import RabbitLink
from nightsplit.broker.rabbitmq.publisher import Publisher
from nightsplit.broker.rabbitmq.version import needs_quorum_queues
from nightsplit.shared.credentials import NO_CREDENTIALS, Credentials
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Broker, Link, Queue

FIRST_CONNECTION_S = 10.0
"""Seconds after which an address that never answered is probably wrong; one that did is tried for ever."""

HEARTBEAT_S = 10
"""Heartbeat interval in seconds: a silent network is noticed within 30 s, so that a site is back soon after it. Large
messages need no more, since each of their frames counts as a heartbeat. Below 5 s RabbitMQ warns of false alarms."""


class RabbitBroker(Broker):
    """Durable queues on a RabbitMQ server or cluster, with a confirm for what is forced to disk.

    Args:
        url: `amqp://user:password@host:port/vhost`, or `amqps` for TLS. With TLS every worker has its own
            user: a message carries its name, RabbitMQ checks it, and the receiver reads it. Several hosts,
            separated by commas, are the nodes of a cluster: they are tried in turn.
        max_message_bytes: size of the largest body; RabbitMQ 4 accepts 16 MiB by default.
        heartbeat: interval in seconds; either side gives up a connection that is silent for two or three intervals.
        credentials: certificates and password, where they are not in the address.

    Raises:
        ConfigError: 107 the address cannot be used, 111 it is an unencrypted one of another machine, 113 a file
            of `credentials` cannot be used.
    """

    def __init__(
        self, url: str, max_message_bytes: int = 16 * 2**20, heartbeat: int = HEARTBEAT_S,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:  # fmt: skip
        tune_process()
        self._addresses = read_addresses(url, heartbeat, credentials)
        self._max_message_bytes = max_message_bytes

    @override
    def declare(self, queues: Iterable[Queue]) -> None:
        """Create the queues that do not exist; also BrokerError 212 a node does not see the queues of another one.

        They are quorum queues in a cluster, and on a server whose classic queues confirm too early. A queue that exists
        on a single server keeps its type.
        """
        queues, is_cluster = list(queues), len(self._addresses) > 1
        with connected(self._addresses, FIRST_CONNECTION_S) as connection:
            quorum = is_cluster or needs_quorum_queues(server_properties(connection))
            channel = connection.channel()
            for queue in queues:
                try:
                    _declare(channel, queue, quorum)
                except ChannelRefused as refusal:
                    if is_cluster or not is_of_other_type(refusal):
                        raise
                    channel = connection.channel()
                    _declare(channel, queue, not quorum)
        if is_cluster and queues:
            self._check_nodes(queues[0])

    def _check_nodes(self, queue: Queue) -> None:
        """Raise BrokerError 212 when a node that answers does not know `queue`: it has lost contact with the others."""
        for parameters in self._addresses:
            try:
                with connected([parameters], 0.0) as connection:
                    connection.channel().queue_declare(queue.name, passive=True)
            except BrokerError as error:
                if error.number == 205:
                    raise split_cluster(queue, parameters) from None

    @override
    def link(self, consume: Sequence[Queue], prefetch: int, owner: str) -> Link:
        """Open a link; BrokerError 201 unreachable, 202 login refused, 205 a queue does not exist."""
        loop, inbox = IOLoop(), Inbox()
        publisher = Publisher(loop, self._addresses, owner, inbox)
        consumer = Consumer(loop, self._addresses, owner, inbox, consume, prefetch)
        link = RabbitLink(loop, inbox, publisher, consumer, self._max_message_bytes, owner)
        try:
            link.wait_until_ready(FIRST_CONNECTION_S * len(self._addresses))  # a frozen host takes its share
        except BaseException:
            link.close()
            raise
        return link

    @override
    def depth(self, queue: Queue) -> int | None:
        # The count may be late after a restart of the broker: a quorum queue tells 0 until it has a leader.
        declared = self._look_up(queue)
        return None if declared is None else declared.message_count

    @override
    def is_consumed(self, queue: Queue) -> bool:
        declared = self._look_up(queue)
        return declared is not None and declared.consumer_count > 0

    def _look_up(self, queue: Queue) -> Any:
        """Return the counts of a queue's messages and consumers; None if it is missing."""
        try:
            with connected(self._addresses, FIRST_CONNECTION_S) as connection:
                return connection.channel().queue_declare(queue.name, passive=True).method
        except BrokerError as error:
            if error.number == 205:
                return None
            raise

    @override
    def delete(self, queues: Iterable[Queue]) -> None:
        """Remove queues with their messages, and exchanges that lead to no other queue."""
        queues = list(queues)
        with connected(self._addresses, FIRST_CONNECTION_S) as connection:
            for queue in queues:
                connection.channel().queue_delete(queue.name)
            for exchange in sorted({queue.exchange for queue in queues}):
                try:
                    connection.channel().exchange_delete(exchange, if_unused=True)
                except ChannelRefused as refusal:
                    if refusal.reply_code != 406:  # 406: it still leads to another queue
                        raise


def _declare(channel: Any, queue: Queue, quorum: bool) -> None:
    """Create a queue with its exchange; ChannelRefused if it exists and differs."""
    channel.exchange_declare(queue.exchange, "direct", durable=True)
    channel.queue_declare(queue.name, durable=True, arguments=arguments(queue, quorum))
    channel.queue_bind(queue.name, queue.exchange, queue.key)
