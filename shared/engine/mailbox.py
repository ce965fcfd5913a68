"""Pipeline of all messages into a worker and out of it. No other code reads headers, refuses or publishes.

    in    link: verify, open ─▶ header ─▶ identity ─▶ schema, decode ─▶ message | dead letter
    out   message ─▶ gate (sites) ─▶ schema, encode ─▶ exit log (sites), kept (server) ─▶ link: sign, seal

The link of a run with keys opens and seals (`nightsplit.broker.sealed`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from nightsplit.shared.engine.counters import Counters
from nightsplit.shared.errors import Refused
from nightsplit.shared.storage.sent import SentMessages
from nightsplit.shared.transport import Delivery, Link, Queue, Route
from nightsplit.shared.wire.format import encode, read_body
from nightsplit.shared.wire.head import Head, read_head
from nightsplit.shared.wire.message import FROM_SITES, SERVER, Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload


@dataclass(frozen=True, slots=True)
class Received:
    """Delivery with its decoded header and a verified sender."""

    head: Head
    delivery: Delivery

    @property
    def header(self) -> Header:
        """Header of the message."""
        return self.head.header


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Refused delivery, to be acknowledged once its copy in the dead letter queue, of id `copy`, is confirmed."""

    delivery: Delivery
    copy: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Header of a sequenced message, and the reason for its refusal; None if it was applied."""

    header: Header
    refusal: Refused | None


class Gate(Protocol):
    """Check of each message against the hospital's policy, see `nightsplit.site_worker.policy`."""

    def check_out(self, header: Header, payload: Payload, samples: int | None) -> None:
        """Check a message with `samples` before it leaves (None: no batch dimension); ConfigError 108 if denied."""

    def check_in(self, header: Header, payload: Payload) -> None:
        """Check a message before it is applied; ConfigError 108 if the policy forbids the weights that it sets."""


class ExitLog(Protocol):
    """Log of what leaves a hospital, see `nightsplit.site_worker.trust.exit_log`."""

    def write(self, header: Header, payload: Payload, samples: int | None, body: Sequence[bytes | memoryview]) -> None:
        """Append the line of a message that is about to leave; StateError 501 or 503 if that is not possible."""

    def witness(self, signed: Mapping[str, Scalar]) -> None:
        """Append a co-signature of the server; errors as `write`."""

    def sync(self) -> None:
        """Force all lines to disk; StateError 501."""


def header_of(body: bytes) -> Header:
    """Decode the header of a stored message, to show it; Refused 301-309 if it cannot be read."""
    return read_head(body).header


class Mailbox:
    """Mailbox of one worker.

    Args:
        link: consumes the incoming queue of every route.
        routes: routes by peer.
        payload_of: returns the schema of a kind; None for one that is not used.
        message_bytes: largest message in both directions.
        gate, exit_log: policy of a site, and log of what leaves it; None at the server, which has no patients.
    """

    sent: SentMessages | None = None
    """Messages in sequence that were sent, at a worker that cannot make them again."""

    def __init__(
        self, run: str, name: str, link: Link, routes: Mapping[str, Route],
        payload_of: Callable[[Kind], Payload | None], message_bytes: int, gate: Gate | None = None,
        exit_log: ExitLog | None = None,
    ) -> None:  # fmt: skip
        self.counters = Counters()
        self.run, self.name, self.link, self.routes, self.message_bytes = run, name, link, routes, message_bytes
        self._payload_of, self._gate, self._exit_log = payload_of, gate, exit_log
        self._senders = {route.incoming.name: peer for peer, route in routes.items()}

    def receive(self, delivery: Delivery) -> Received | DeadLetter:
        """Decode a header and verify its sender; a message refused here has no place in any sequence."""
        self.counters.counts["received_bytes"] += len(delivery.body)
        sender = self._senders[delivery.queue]
        if delivery.refusal is not None:
            return self.dead_letter(delivery, delivery.refusal)
        try:
            head = read_head(delivery.body, self._schema)
            header = head.header
            if (header.run, header.sender, header.receiver) != (self.run, sender, self.name) or (
                not delivery.may_be_from(sender, self.name)  # this worker replays its dead letters itself
            ):
                sentence = f"{header.message_id} came through {delivery.queue}{delivery.by}."
                raise Refused(310, sentence, "check which worker publishes to that queue.")
        except Refused as refusal:
            return self.dead_letter(delivery, refusal)
        return Received(head, delivery)

    def open(self, received: Received) -> Message:
        """Decode a message when its turn has come; Refused 303-309, 311, ConfigError 108 if the policy forbids it."""
        message = read_body(received.head, received.delivery.body, self.message_bytes)
        if self._gate is not None and received.head.payload is not None:
            self._gate.check_in(received.header, received.head.payload)
        return message

    def dead_letter(self, delivery: Delivery, refusal: Refused, seq: int | None = None) -> DeadLetter:
        """Publish a copy with the reason to the dead letter queue; `seq` is its number in a sequence, if it has one."""
        sender = self._senders[delivery.queue]
        self.counters.count_refused(sender, seq, refusal)
        copy = f"dead/{delivery.message_id}/{self.counters.counts['refused']}"
        reason = {
            "number": str(refusal.number), "reason": str(refusal), "sender": sender, "queue": delivery.queue,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        self.link.publish(self.routes[sender].dead, copy, [delivery.original], reason)
        return DeadLetter(delivery, copy)

    def _schema(self, header: Header) -> Payload:
        payload = self._payload_of(header.kind)
        if payload is None or (header.kind in FROM_SITES) is (header.sender == SERVER):
            raise Refused(303, f"{header.kind} from {header.sender} is not used here.", "run one protocol at both.")
        return payload

    def header(
        self, receiver: str, kind: Kind, seq: int, reply_to: int = 0, version: int = 0, fence: int = 0
    ) -> Header:
        """Return the header of a message from this worker."""
        return Header(self.run, self.name, receiver, kind, seq, reply_to, version, fence)

    def send(self, message: Message, name: str | None = None) -> str:
        """Publish a message, and return the id under which it is confirmed.

        Args:
            name: id at the broker, for messages with equal headers (chunks of a query); by default the message's own.

        Raises:
            ConfigError: 108 the hospital's policy forbids it.
            Refused: 301, 304-308 it does not match the schema of its kind.
        """
        payload = self._payload_of(message.header.kind)
        assert payload is not None, message.header.kind
        samples = payload.samples({tensor: values.shape for tensor, values in message.tensors.items()})
        if self._gate is not None:
            self._gate.check_out(message.header, payload, samples)
        name = name or message.header.message_id
        body = encode(message, payload, self.message_bytes)
        if self._exit_log is not None:
            self._exit_log.write(message.header, payload, samples, body)
        if self.sent is not None and message.header.seq:
            self.sent.keep(message.header.receiver, message.header.seq, name, body)
        self._publish(message.header.receiver, name, body)
        return name

    def send_kept(self, receiver: str, seq: int) -> str | None:
        """Publish a message again as it was, and return its id; None if it is not kept."""
        kept = self.sent.find(receiver, seq) if self.sent is not None else None
        if kept is None:
            return None
        name, body = kept
        self._publish(receiver, name, [body])
        return name

    def release(self, receiver: str, last: int) -> None:
        """Keep no message up to number `last` to a receiver."""
        if self.sent is not None:
            self.sent.release(receiver, last)

    def sync(self) -> None:
        """Force to disk what is known of all messages sent so far; StateError 501."""
        if self.sent is not None:
            self.sent.sync()
        if self._exit_log is not None:
            self._exit_log.sync()

    def _publish(self, receiver: str, name: str, body: Sequence[bytes | memoryview]) -> None:
        self.link.publish(self.routes[receiver].outgoing, name, body)
        self.counters.counts.update(sent=1, sent_bytes=sum(memoryview(piece).nbytes for piece in body))

    def witness(self, signed: Mapping[str, Scalar]) -> None:
        """Keep a co-signature of the server in the exit log."""
        if self._exit_log is not None:
            self._exit_log.witness(signed)

    def send_again(self, queue: Queue, name: str, letter: Delivery) -> None:
        """Publish a dead letter, as it came from the broker, to the queue of its message.

        Raises:
            ConfigError: 108 it is a site's own message, which the hospital's policy now forbids.
            Refused: 301-311 it is a site's own message, which cannot be read.
            BrokerError: 203 as in `Link.publish`.
        """
        is_outgoing = any(queue.name == route.outgoing.name for route in self.routes.values())
        if self._gate is not None and is_outgoing:
            head = read_head(letter.body, self._schema)
            if head.refusal is not None:
                raise head.refusal
            assert head.payload is not None, head.header.kind
            samples = head.payload.samples({entry.name: entry.shape for entry in head.entries})
            self._gate.check_out(head.header, head.payload, samples)
            if self._exit_log is not None:
                self._exit_log.write(head.header, head.payload, samples, [letter.body])
        self.link.publish(queue, name, [letter.original])
