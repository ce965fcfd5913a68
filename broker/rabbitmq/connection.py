"""A connection to RabbitMQ that comes back by itself; what `publisher` and `consumer` share.

It belongs to a link's I/O thread; see the drawing in `nightsplit.broker.rabbitmq.broker`.
"""

import copy
import logging
import math
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pika import exceptions
from pika.adapters.select_connection import IOLoop, SelectConnection
from pika.adapters.utils import io_services_utils

from nightsplit.broker.rabbitmq.errors import connection_lost, permanent_error, unreachable
from nightsplit.broker.rabbitmq.inbox import Inbox
from nightsplit.broker.rabbitmq.outbox import Backoff
from nightsplit.shared.errors import BrokerError

__all__ = ["ChannelRefused", "Connection", "IOLoop", "tune_process"]

MISSING_S = 120.0
"""How long a queue may be missing: nodes of a cluster that lost sight of each other find together again."""

FORGET_MISSING_S = 60.0
"""Longer than between two attempts. What was missing earlier than that has been there meanwhile."""

FORGOTTEN_S = 60.0
"""How long a cluster may keep silent on a channel to which it owes something."""

LOOKS = 4
"""How often it is looked at in that time."""

RECEIVE_BYTES = 128 * 2**10
"""What pika reads at a time: the size of an AMQP frame."""

ChannelRefused = exceptions.ChannelClosedByBroker


def tune_process() -> None:
    """Settings of the process that this transport needs."""
    # A worker in pure Python code gives the interpreter away every 5 ms by default, and the I/O
    # thread needs it for every frame of 128 KB: measured 46 MB/s, against 165 MB/s with 0.5 ms.
    sys.setswitchinterval(0.0005)
    # pika reads 4 KB at a time and copies what it has of a frame each time: 3 times slower.
    if hasattr(io_services_utils._AsyncTransportBase, "_MAX_RECV_BYTES"):
        io_services_utils._AsyncTransportBase._MAX_RECV_BYTES = RECEIVE_BYTES
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # failures are reported as events and errors


class Connection(ABC):
    """One connection with one channel, opened again whenever it is lost.

        connect ─▶ _on_open ─▶ _prepare (subclass) ─▶ _now_up ─ ─ ─ ┐
           ▲                                                        │ lost, or its channel closed
           └─── next host, pause ◀──── _on_end ◀────────────────────┘

    A closed channel closes its connection too: with a single way back, that way is well trodden.
    A new connection is opened only after the old one has reported its end.
    """

    role: str  # "publishing" or "consuming"

    def __init__(self, loop: Any, addresses: Sequence[Any], owner: str, inbox: Inbox) -> None:
        self.was_up = threading.Event()
        self.on_ended: Callable[[], None] = lambda: None
        self._loop = loop
        self._inbox = inbox
        self._addresses = deque(copy.copy(parameters) for parameters in addresses)
        for parameters in self._addresses:
            parameters.client_properties = {"connection_name": f"nightsplit {owner} {self.role}"}
        self._pauses = Backoff()
        self._connection: Any = None
        self._channel: Any = None  # None unless it may be used
        self._retry: Any = None
        self._why: BaseException | None = None  # what closed the channel; the connection ends after it
        self._last_error: BaseException | None = None
        self._renewing = False
        self._closing = False
        self._missing_first = self._missing_last = -math.inf
        self._quiet_since = -math.inf

    @property
    def _parameters(self) -> Any:
        """Of the host whose turn it is."""
        return self._addresses[0]

    @property
    def _is_cluster(self) -> bool:
        return len(self._addresses) > 1

    @abstractmethod
    def _prepare(self, channel: Any) -> None:
        """Set up a fresh channel; ends in `_now_up`."""

    @abstractmethod
    def _lost(self) -> None:
        """Forget what was bound to the channel; the connection has ended."""

    @abstractmethod
    def _is_owed(self) -> bool:
        """Whether the broker should have said something meanwhile; asked when it was quiet for long."""

    @property
    def has_ended(self) -> bool:
        """Whether the connection is closed for good."""
        return self._closing and self._connection is None

    def unreachable(self) -> BrokerError:
        """The error for a broker that does not answer."""
        return unreachable(self._last_error, self._parameters)

    def connect(self) -> None:
        """Begin to connect, and go on until it works."""
        self._retry = self._why = None
        self._connection = SelectConnection(
            self._parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_end,
            on_close_callback=self._on_end,
            custom_ioloop=self._loop,
        )

    def close(self) -> None:
        """Close for good, in order where the broker takes part."""
        self._closing = True
        if self._retry is not None:
            self._loop.remove_timeout(self._retry)
        self._let_go()

    def abort(self, why: str) -> None:
        """End the connection without the broker, which may be away or not reading."""
        if self._connection is not None:
            # pika's public close() waits for the broker's answer.
            self._connection._terminate_stream(exceptions.ConnectionClosedByClient(200, why))

    def _let_go(self) -> None:
        """Close the connection so that its unacknowledged deliveries are the next to be delivered.

        Of itself pika would cancel the consumers first. The broker then wakes a standby, and (seen
        with a quorum queue) gives it what follows, before our deliveries are back in their places.
        """
        if self._connection is not None and not (self._connection.is_closing or self._connection.is_closed):
            self._channel = None
            self._connection._channels.clear()
            self._connection.close()

    def _on_open(self, connection: Any) -> None:
        connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        self._channel = channel
        self._prepare(channel)

    def _on_channel_closed(self, channel: Any, reason: BaseException) -> None:
        # The broker closes a channel alone when an acknowledgement is overdue, for example; the
        # connection would stay open then, and silent for ever.
        self._why = reason
        self._let_go()

    def _now_up(self) -> None:
        if time.monotonic() - self._missing_last > FORGET_MISSING_S:  # else it may be missing still
            self._pauses = Backoff()
        self.was_up.set()
        self._inbox.over(self.role)
        if self._is_cluster:
            self._heard()
            self._look_later()

    def _heard(self) -> None:
        """Something went to or fro on the channel."""
        self._quiet_since = time.monotonic()

    def _look_later(self) -> None:
        self._loop.call_later(FORGOTTEN_S / LOOKS, partial(self._look, self._channel))

    def _look(self, channel: Any) -> None:
        """Give a channel up that its cluster has forgotten: its heartbeats go on, and nothing else would.

        Seen with quorum queues of RabbitMQ 3.10, after a node that led them had stood still and came back.
        """
        if channel is None or channel is not self._channel:
            return  # a later one is looked at by itself
        all_written = self._connection._transport.get_write_buffer_size() == 0  # a slow line is no silence
        if all_written and time.monotonic() - self._quiet_since >= FORGOTTEN_S and self._is_owed():
            self.abort(
                f"the broker owes an answer and is silent for {FORGOTTEN_S:.0f} s"
            )  # it would owe a farewell too
        else:
            self._look_later()

    def _on_end(self, connection: Any, reason: BaseException) -> None:
        self._last_error = reason = self._why or reason
        self._connection = self._channel = None
        error = permanent_error(reason, self._parameters)
        if self._closing:
            self.on_ended()
        elif self._renewing:
            self._renewing = False
            self.connect()
        elif error is not None and not self._may_come_back(error):
            self._inbox.fail(error)
        else:
            self._inbox.trouble(self.role, connection_lost(reason, self._parameters))
            self._retry = self._loop.call_later(next(self._pauses), self._connect_to_next)
        self._lost()

    def _connect_to_next(self) -> None:
        self._addresses.rotate(-1)
        self.connect()

    def _may_come_back(self, error: BrokerError) -> bool:
        """Whether a queue is missing, not for long yet, in a cluster: its parts may lose sight of each other."""
        if error.number != 205 or not self._is_cluster or not self.was_up.is_set():
            return False
        now = time.monotonic()
        if now - self._missing_last > FORGET_MISSING_S:
            self._missing_first = now
        self._missing_last = now
        return now - self._missing_first < MISSING_S
