"""Connection to RabbitMQ that reconnects by itself, the base of `publisher` and `consumer`.

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
from nightsplit.broker.rabbitmq.outbox import backoff
from nightsplit.broker.rabbitmq.version import version_refused
from nightsplit.shared.errors import BrokerError

__all__ = ["ChannelRefused", "Connection", "IOLoop", "tune_process"]

QUEUE_MISSING_S_MAX = 120.0
"""Longest time in seconds that a queue may be missing: the nodes of a split cluster find each other again."""

QUEUE_FOUND_S = 60.0
"""Seconds, longer than between two attempts, after which a missing queue counts as found in the meantime."""

SILENCE_S_MAX = 10.0
"""Longest silence in seconds of a cluster on a channel that it may owe a reply, before and after it is asked."""

RECEIVE_BYTES = 128 * 2**10
"""Bytes that pika reads at a time: the size of an AMQP frame."""

ChannelRefused = exceptions.ChannelClosedByBroker


def tune_process() -> None:
    """Apply the settings of the process that this transport needs."""
    # A worker in pure Python code releases the interpreter every 5 ms by default, and the I/O
    # thread needs it for every frame of 128 KB: measured 46 MB/s, against 165 MB/s with 0.5 ms.
    sys.setswitchinterval(0.0005)
    # pika reads 4 KB at a time and copies the partial frame each time: 3 times slower.
    if hasattr(io_services_utils._AsyncTransportBase, "_MAX_RECV_BYTES"):
        io_services_utils._AsyncTransportBase._MAX_RECV_BYTES = RECEIVE_BYTES
    logging.getLogger("pika").setLevel(logging.CRITICAL + 1)  # failures are reported as events and errors


class Connection(ABC):
    """Connection with one channel, opened again whenever it is lost.

        connect ─▶ _on_open ─▶ _prepare (subclass) ─▶ _on_ready ─ ─ ┐
           ▲                                                        │ lost, or its channel closed
           └─── next host, pause ◀──── _on_end ◀────────────────────┘

    A closed channel closes its connection too, so that there is a single, well-tested way to recover.
    A new connection is opened only after the old one has reported its end.
    """

    role: str  # "publishing" or "consuming"

    def __init__(self, loop: Any, addresses: Sequence[Any], owner: str, inbox: Inbox) -> None:
        self.ready = threading.Event()
        self.on_ended: Callable[[], None] = lambda: None
        self._loop = loop
        self._inbox = inbox
        self._addresses = deque(copy.copy(parameters) for parameters in addresses)
        for parameters in self._addresses:
            parameters.client_properties = {"connection_name": f"nightsplit {owner} {self.role}"}
        self._pauses = backoff()
        self._connection: Any = None
        self._channel: Any = None  # None unless it may be used
        self._retry: Any = None
        self._channel_error: BaseException | None = None  # closed the channel; the connection ends after it
        self._last_error: BaseException | None = None
        self._is_renewing = False
        self._is_closing = False
        self._missing_since = self._missing_at = -math.inf
        self._last_traffic = -math.inf

    @property
    def _parameters(self) -> Any:
        """Parameters of the current host."""
        return self._addresses[0]

    @property
    def _is_cluster(self) -> bool:
        return len(self._addresses) > 1

    @abstractmethod
    def _prepare(self, channel: Any) -> None:
        """Set up a fresh channel; ends in `_on_ready`."""

    @abstractmethod
    def _on_lost(self) -> None:
        """Reset the state that belonged to the channel; the connection has ended."""

    @abstractmethod
    def _is_reply_due(self) -> bool:
        """Return whether the broker owes the channel something, or may; called after a long silence."""

    @abstractmethod
    def _ask(self, side_channel: Any) -> set[str]:
        """Ask the broker what it owes, on the channel or on `side_channel`, which is closed afterwards.

        Returns:
            Names of what is overdue unless it comes; it disappears from the set when the broker owes it no longer.
        """

    @property
    def has_ended(self) -> bool:
        """True when the connection is closed for good."""
        return self._is_closing and self._connection is None

    def unreachable(self) -> BrokerError:
        """Return the error for a broker that does not answer."""
        return unreachable(self._last_error, self._parameters)

    def connect(self) -> None:
        """Begin to connect, and retry until it works."""
        self._retry = self._channel_error = None
        self._connection = SelectConnection(
            self._parameters,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_end,
            on_close_callback=self._on_end,
            custom_ioloop=self._loop,
        )

    def close(self) -> None:
        """Close for good, with a handshake where the broker takes part."""
        self._is_closing = True
        if self._retry is not None:
            self._loop.remove_timeout(self._retry)
        self._disconnect()

    def abort(self, reason: str) -> None:
        """End the connection without the broker, which may be unreachable or not reading."""
        if self._connection is not None:
            # pika's public close() waits for the broker's reply.
            self._connection._terminate_stream(exceptions.ConnectionClosedByClient(200, reason))

    def _disconnect(self) -> None:
        """Close the connection so that its unacknowledged deliveries are the next to be delivered.

        By default pika would cancel the consumers first. The broker then activates a standby, and (seen
        with a quorum queue) delivers later messages to it before ours are back in their places.
        """
        if self._connection is not None and not (self._connection.is_closing or self._connection.is_closed):
            self._channel = None
            self._connection._channels.clear()
            self._connection.close()

    def _on_open(self, connection: Any) -> None:
        host = f"{self._parameters.host}:{self._parameters.port}"
        if refusal := version_refused(connection.server_properties, host):
            self._channel_error = refusal  # also where it was upgraded, or another host answers, while the worker ran
            self._disconnect()
        else:
            connection.channel(on_open_callback=self._on_channel)

    def _on_channel(self, channel: Any) -> None:
        channel.add_on_close_callback(self._on_channel_closed)
        self._channel = channel
        self._prepare(channel)

    def _on_channel_closed(self, channel: Any, reason: BaseException) -> None:
        # The broker closes only the channel when an acknowledgement is overdue, for example; the
        # connection would then stay open, and silent for ever.
        self._channel_error = reason
        self._disconnect()

    def _on_ready(self) -> None:
        if time.monotonic() - self._missing_at > QUEUE_FOUND_S:  # else it may still be missing
            self._pauses = backoff()
        self.ready.set()
        self._inbox.unblock(self.role)
        if self._is_cluster:
            self._note_traffic()
            self._schedule_check()

    def _note_traffic(self) -> None:
        """Note that there was traffic on the channel."""
        self._last_traffic = time.monotonic()

    def _schedule_check(self) -> None:
        self._loop.call_later(SILENCE_S_MAX / 4, partial(self._check_silence, self._channel))

    def _check_silence(self, channel: Any) -> None:
        """Ask a cluster that is silent although it may owe a reply, and begin anew when it stays silent.

        Heartbeats go on at a node that is cut off from the majority (RabbitMQ 4.3), and on a channel that a quorum
        queue has lost (seen with 3.10, after a node that led it had stood still and came back).
        """
        if channel is None or channel is not self._channel:
            return  # a later channel has its own checks
        if time.monotonic() - self._last_traffic >= SILENCE_S_MAX and self._is_reply_due():
            self._open_side_channel(partial(self._examine, channel, self._last_traffic))
        else:
            self._schedule_check()

    def _open_side_channel(self, on_open: Callable[[Any], None]) -> None:
        """Open another channel: the broker does so when it has read all that we sent, and behind all that it sends.

        So a slow network is no silence; and a broker that does not read, frozen or with an alarm, is not judged.
        """
        self._connection.channel(on_open_callback=on_open)

    def _examine(self, channel: Any, last_traffic: float, side_channel: Any) -> None:
        if channel is not self._channel:
            return
        if last_traffic != self._last_traffic:
            side_channel.close()
            self._schedule_check()
            return
        self._note_traffic()
        overdue = self._ask(side_channel)
        self._loop.call_later(SILENCE_S_MAX, partial(self._end_silence, channel, self._last_traffic, overdue))

    def _end_silence(self, channel: Any, asked_at: float, overdue: set[str], side_channel: Any = None) -> None:
        if channel is not self._channel:
            return
        is_silent = asked_at == self._last_traffic and overdue and self._is_reply_due()
        if is_silent and side_channel is None:
            self._open_side_channel(partial(self._end_silence, channel, asked_at, overdue))
        elif is_silent:
            # A handshake would wait for the same broker.
            self.abort(f"the broker owes a reply and is silent for {2 * SILENCE_S_MAX:.0f} s")
        else:
            self._schedule_check()
            if side_channel is not None:
                side_channel.close()

    def _on_end(self, connection: Any, reason: BaseException) -> None:
        self._last_error = reason = self._channel_error or reason
        self._connection = self._channel = None
        error = permanent_error(reason, self._parameters)
        if self._is_closing:
            self.on_ended()
        elif self._is_renewing:
            self._is_renewing = False
            self.connect()
        elif error is not None and not self._is_temporary(error):
            self._inbox.fail(error)
        else:
            self._inbox.block(self.role, connection_lost(reason, self._parameters))
            self._retry = self._loop.call_later(next(self._pauses), self._connect_to_next)
        self._on_lost()

    def _connect_to_next(self) -> None:
        self._addresses.rotate(-1)
        self.connect()

    def _is_temporary(self, error: BrokerError) -> bool:
        """Return whether a queue is missing in a cluster, not for long yet: its nodes may be out of contact."""
        if error.number != 205 or not self._is_cluster or not self.ready.is_set():
            return False
        now = time.monotonic()
        if now - self._missing_at > QUEUE_FOUND_S:
            self._missing_since = now
        self._missing_at = now
        return now - self._missing_since < QUEUE_MISSING_S_MAX
