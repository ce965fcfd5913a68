"""Link that signs and seals every message of a run, and opens those that arrive.

    worker ──message──▶ sign, seal ──envelope──▶ broker ──envelope──▶ verify, open ──message──▶ worker

A dead letter is the envelope itself, so that the broker cannot read it and a replayed one is still verified. The
reason of its refusal, which quotes the message, is sealed, too.
"""

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from typing_extensions import override

from nightsplit.broker.link_wrapper import LinkWrapper
from nightsplit.shared.errors import TITLES, Refused, StateError
from nightsplit.shared.transport import Delivery, Event, Link, Queue, Route
from nightsplit.shared.trust.envelope import Sealer
from nightsplit.shared.wire.head import read_head
from nightsplit.shared.wire.message import Kind

REASON = "reason"
"""Header of a dead letter."""

HANDSHAKE = frozenset({Kind.MANIFEST, Kind.HELLO, Kind.REJECTED})
"""Kinds that are only signed until the receiver's run key is known; they say nothing about patients."""


class SealedLink(LinkWrapper):
    """Link of a run with keys.

    Args:
        link: moves the envelopes.
        sealer: the worker's.
        name: this worker.
        routes: routes by peer.
        seals: False for queries, which are ciphertexts of the site's own key, and may be answered by any of several
            servers: their envelopes are only signed.
    """

    def __init__(
        self, link: Link, sealer: Sealer, name: str, routes: Mapping[str, Route], *, seals: bool = True
    ) -> None:  # fmt: skip
        super().__init__(link)
        self._sealer, self._name, self._seals = sealer, name, seals
        self._receivers = {route.outgoing.name: peer for peer, route in routes.items()}
        self._senders = {route.incoming.name: peer for peer, route in routes.items()}
        self._dead = {route.dead.name: peer for peer, route in routes.items()}

    @override
    def publish(
        self, queue: Queue, message_id: str, body: Sequence[bytes | memoryview], headers: Mapping[str, str] = {}
    ) -> None:
        if queue.name in self._receivers:
            body = [self._enclose(self._receivers[queue.name], b"".join(body))]
        elif queue.name in self._dead and REASON in headers:
            headers = {**headers, REASON: self._hide(self._dead[queue.name], headers[REASON])}
        self._link.publish(queue, message_id, body, headers)

    @override
    def receive(self, timeout: float) -> Event | None:
        event = self._link.receive(timeout)
        if isinstance(event, Delivery) and event.queue in self._senders:
            return self._open(event, self._senders[event.queue])
        return event

    def _enclose(self, receiver: str, content: bytes) -> bytes:
        if not self._seals:
            return self._sealer.sign(receiver, content)
        if self._sealer.can_seal(receiver):
            return self._sealer.seal(receiver, content)
        if not _is_handshake(content):
            fix = "restore the whole state folder from one backup; a part of it is of no use."
            raise StateError(514, f"the key of {receiver} is not in {self._sealer.keys.folder}.", fix)
        return self._sealer.sign(receiver, content)

    def _hide(self, peer: str, reason: str) -> str:
        if not self._sealer.can_seal(peer):
            return reason.partition(":")[0]  # number and title
        return base64.b64encode(self._sealer.seal(peer, reason.encode())).decode()

    def _open(self, delivery: Delivery, sender: str) -> Delivery:
        try:
            opened = self._sealer.open(sender, self._name, delivery.body)
            if self._seals and not opened.sealed and not _is_handshake(opened.content):
                raise Refused(317, f"a message of {sender} is not sealed.", "update nightsplit there.")
        except Refused as refusal:
            return replace(delivery, body=b"", envelope=delivery.body, refusal=refusal)
        self._sealer.keys.learn(sender, opened.run_key)
        return replace(delivery, body=opened.content, envelope=delivery.body)


def open_letter(letter: Delivery, sealer: Sealer, sender: str, receiver: str) -> Delivery:
    """Return a dead letter with its message and its reason, as far as this worker can open them.

    `sender` and `receiver` are those of the message; the receiver has refused it.
    """
    body, headers = b"", dict(letter.headers)
    sealed_reason = headers.get(REASON, "")
    with suppress(KeyError, ValueError):  # a finished run has no key for it any more
        number = int(headers["number"])
        headers[REASON] = f"E{number} {TITLES[number]}"
    with suppress(Refused):
        body = sealer.open(sender, receiver, letter.body).content
    with suppress(Refused, KeyError, ValueError):
        headers[REASON] = sealer.open(receiver, sender, base64.b64decode(sealed_reason)).content.decode()
    return replace(letter, body=body, envelope=letter.body, headers=headers)


def _is_handshake(content: bytes) -> bool:
    """Return whether a message may be readable at the broker: of the handshake, before the site has enrolled."""
    try:
        head = read_head(content)
    except Refused:
        return False
    return head.header.kind in HANDSHAKE and not head.scalars.get("enrolled", False)


def sealed(link: Link, sealer: Sealer | None, name: str, routes: Mapping[str, Route], *, seals: bool = True) -> Link:
    """Return a worker's link, with envelopes if its run has keys."""
    return link if sealer is None else SealedLink(link, sealer, name, routes, seals=seals)
