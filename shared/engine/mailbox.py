"""The one pipeline of messages, into a worker and out of it. Nothing else reads a header, refuses, or publishes.

    in    delivery ─▶ header ─▶ identity ─▶ [open] ─▶ schema, decode ─▶ message | dead letter
    out   message ─▶ gate (sites) ─▶ schema, encode ─▶ [seal] ─▶ publish

The stages in brackets are empty: a sealed message would be opened and verified before its schema is looked at, and
sealed behind its encoding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from nightsplit.shared.engine.counters import Counters
from nightsplit.shared.errors import Refused
from nightsplit.shared.transport import Delivery, Link, Queue, Route
from nightsplit.shared.wire.format import encode, read_body
from nightsplit.shared.wire.head import Head, read_head
from nightsplit.shared.wire.message import FROM_SITES, SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload


@dataclass(frozen=True, slots=True)
class Received:
    """A delivery whose header was read, and which is from whom it says.

    Attributes:
        head: of the message.
        delivery: holds the rest of it.
    """

    head: Head
    delivery: Delivery

    @property
    def header(self) -> Header:
        """Who says what to whom."""
        return self.head.header


@dataclass(frozen=True, slots=True)
class PutAside:
    """A delivery that was refused.

    Attributes:
        delivery: to be acknowledged once its copy is safe.
        copy: id under which the copy in the dead letter queue is confirmed.
    """

    delivery: Delivery
    copy: str


class Gate(Protocol):
    """The hospital's word on each message, see `nightsplit.site_worker.policy`."""

    def check_out(self, header: Header, payload: Payload, samples: int | None) -> None:
        """Check a message that leaves, with the number of samples in it; None where it holds none by itself.

        Raises:
            ConfigError: 108 the hospital does not let it out.
        """

    def check_in(self, header: Header, payload: Payload) -> None:
        """Check a message before it is obeyed.

        Raises:
            ConfigError: 108 it sets what the hospital keeps to itself.
        """


def header_of(body: bytes) -> Header:
    """Read the header of a message that lies somewhere, to show it.

    Raises:
        Refused: 301-309 it cannot be read.
    """
    return read_head(body).header


class Mailbox:
    """Messages of one worker.

    Args:
        run: id of the run.
        name: of the worker.
        link: consumes the incoming queue of every route.
        routes: by peer.
        payload_of: schema of a kind; None for one that is not used.
        message_bytes: largest message, both ways.
        gate: at a site; None at the server, which has no patients.
    """

    def __init__(
        self, run: str, name: str, link: Link, routes: Mapping[str, Route],
        payload_of: Callable[[Kind], Payload | None], message_bytes: int, gate: Gate | None = None,
    ) -> None:  # fmt: skip
        self.counters = Counters()
        self.run, self.name, self.link, self.routes, self.message_bytes = run, name, link, routes, message_bytes
        self._payload_of, self._gate = payload_of, gate
        self._senders = {route.incoming.name: peer for peer, route in routes.items()}

    # -- in ----------------------------------------------------------------------------------------

    def receive(self, delivery: Delivery) -> Received | PutAside:
        """Read a header, once, and check who sent it; a message that fails here has no place in any sequence."""
        self.counters.received(delivery.body)
        sender = self._senders[delivery.queue]
        try:
            head = read_head(delivery.body, self._schema)
            header = head.header
            if (header.run, header.sender, header.receiver) != (self.run, sender, self.name) or (
                not delivery.may_be_from(sender, self.name)
            ):
                raise Refused(
                    310,
                    f"{header.message_id} came through {delivery.queue}{delivery.by}.",
                    "check which worker publishes to that queue.",
                )
        except Refused as refusal:
            return self.put_aside(delivery, refusal)
        return Received(head, delivery)

    def open(self, received: Received) -> Message:
        """Decode a message whose turn it is.

        Raises:
            Refused: 303-309, 311 it is not what its kind carries here.
            ConfigError: 108 the hospital does not obey it.
        """
        message = read_body(received.head, received.delivery.body, self.message_bytes)
        if self._gate is not None and received.head.payload is not None:
            self._gate.check_in(received.header, received.head.payload)
        return message

    def put_aside(self, delivery: Delivery, refusal: Refused, seq: int | None = None) -> PutAside:
        """Publish a copy with the reason to the dead letter queue.

        Args:
            delivery: what is refused.
            refusal: why.
            seq: place in its sender's sequence, if it has one.
        """
        sender = self._senders[delivery.queue]
        self.counters.refused(sender, seq, refusal)
        copy = f"dead/{delivery.message_id}/{self.counters.counts['refused']}"
        reason = {
            "number": str(refusal.number), "reason": str(refusal), "sender": sender, "queue": delivery.queue,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        self.link.publish(self.routes[sender].dead, copy, [delivery.body], reason)
        return PutAside(delivery, copy)

    def _schema(self, header: Header) -> Payload:
        payload = self._payload_of(header.kind)
        if payload is None or (header.kind in FROM_SITES) is (header.sender == SERVER):
            raise Refused(303, f"{header.kind} from {header.sender} is not used here.", "run one protocol at both.")
        return payload

    # -- out ---------------------------------------------------------------------------------------

    def header(
        self, receiver: str, kind: Kind, seq: int, reply_to: int = 0, version: int = 0, fence: int = 0
    ) -> Header:
        """Make the header of a message from this worker."""
        return Header(self.run, self.name, receiver, kind, seq, reply_to, version, fence)

    def send(self, message: Message, name: str | None = None) -> str:
        """Publish a message, and return the id under which it is confirmed.

        Args:
            message: from this worker.
            name: for the broker, where several messages have one id; the message's own otherwise.

        Raises:
            ConfigError: 108 the hospital does not let it out.
            Refused: 301, 304-308 it is not what its kind carries.
        """
        payload = self._payload_of(message.header.kind)
        assert payload is not None, message.header.kind
        if self._gate is not None:
            shapes = {tensor: values.shape for tensor, values in message.tensors.items()}
            self._gate.check_out(message.header, payload, payload.samples(shapes))
        name = name or message.header.message_id
        body = encode(message, payload, self.message_bytes)
        self.link.publish(self.routes[message.header.receiver].outgoing, name, body)
        self.counters.sent(body)
        return name

    def send_again(self, queue: Queue, name: str, body: bytes) -> None:
        """Publish the bytes of a message to a queue in which they were before.

        Raises:
            ConfigError: 108 they are a site's own message, which the hospital no longer lets out.
            Refused: 301-311 they are, and cannot be read.
            BrokerError: 203 as `Link.publish`.
        """
        leaves = any(queue.name == route.outgoing.name for route in self.routes.values())
        if self._gate is not None and leaves:
            head = read_head(body, self._schema)
            if head.refusal is not None or head.payload is None:
                raise head.refusal or AssertionError(head.header.kind)
            shapes = {entry.name: entry.shape for entry in head.entries}
            self._gate.check_out(head.header, head.payload, head.payload.samples(shapes))
        self.link.publish(queue, name, [body])
