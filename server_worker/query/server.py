"""Server of the Query shape, which answers queries as they come and stores only public keys.

    chunks come in ──▶ parcel complete ──▶ evaluated ──▶ answer published ──▶ answer confirmed ──▶ chunks acknowledged
                                        (several at once)

Until the last step the broker holds the query: when a server dies before it, the next one answers. So any
number of servers may stand by, and a second answer to the same query does no harm.
"""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from nightsplit.server_worker.he.arithmetic import Arithmetic
from nightsplit.server_worker.query.pool import Evaluate
from nightsplit.shared.engine.mailbox import DeadLetter, Mailbox
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.he.ckks import CkksParameters, PublicKeys
from nightsplit.shared.protocols.query import BLINDED_ELSEWHERE, KEYS_UNKNOWN, Parcels, chunks
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.transport import Confirmed, Delivery
from nightsplit.shared.wire.message import Header, Kind, Message

POLL_INTERVAL_S = 0.5
"""Seconds of waiting for a message between two checks whether to stop."""
EVALUATION_POLL_INTERVAL_S = 0.01
"""Seconds between two checks whether an evaluation has ended."""

Parcel = tuple[str, Kind, int, int]
"""Site, kind, number and step."""


def _parcel(header: Header) -> Parcel:
    return header.sender, header.kind, header.seq, header.version


class _Evaluation(NamedTuple):
    """Running evaluation of a query, with its header, the last of its chunks and the blinding of its answer."""

    header: Header
    delivery: Delivery
    blinding: str


class QueryServer:
    """Server that answers the queries of all sites.

    Args:
        evaluate: starts the evaluation of a query.
        secret_name: name of the secret that states are blinded with.
        keys: folder of the sites' public keys.

    Attributes:
        answered: queries so far, each step counted.
        refused: messages that were refused.
    """

    def __init__(
        self, mailbox: Mailbox, ckks: CkksParameters, evaluate: Evaluate, secret_name: str, keys: Path
    ) -> None:
        self._mailbox, self._ckks, self._evaluate = mailbox, ckks, evaluate
        self._secret_name, self._keys = secret_name, keys
        self._parcels = {site: Parcels() for site in mailbox.routes}
        self._unacknowledged: defaultdict[Parcel, list[Delivery]] = defaultdict(list)
        """Chunks of parcels that are not answered yet."""
        self._evaluations: dict[Future[list[bytes]], _Evaluation] = {}
        self._unconfirmed: dict[str, Parcel] = {}
        """Parcels by the id of an unconfirmed message that answers them."""
        self._unidentified: dict[str, Delivery] = {}
        """Messages without a valid sender, by the id of their copy in the dead letter queue."""
        self._refused_parcels: set[Parcel] = set()
        """Parcels of which a chunk was refused: their other chunks are discarded."""
        self._sent = 0
        self.answered = self.refused = 0

    def run(self, stop: Callable[[], bool], idle_seconds: float | None) -> None:
        """Answer until `stop()` is true or nothing came for `idle_seconds`; StateError 509 when a process is gone."""
        last = time.monotonic()
        while not stop():
            event = self._mailbox.link.receive(EVALUATION_POLL_INTERVAL_S if self._evaluations else POLL_INTERVAL_S)
            if isinstance(event, Delivery):
                self._add_chunk(event)
            elif isinstance(event, Confirmed):
                self._on_confirmed(event.message_id)
            self._send_answers()
            if event is not None or self._unconfirmed or self._evaluations:
                last = time.monotonic()
            elif idle_seconds is not None and time.monotonic() - last > idle_seconds:
                return

    def _add_chunk(self, delivery: Delivery) -> None:
        received = self._mailbox.receive(delivery)
        if isinstance(received, DeadLetter):
            self.refused += 1
            self._unidentified[received.copy] = delivery
            return
        parcel = _parcel(received.header)
        if parcel in self._refused_parcels:
            self._mailbox.link.acknowledge(delivery)
            return
        self._unacknowledged[parcel].append(delivery)
        try:
            message = self._mailbox.open(received)
            pieces = self._parcels[received.header.sender].add(message)
            if pieces is not None:
                self._start(message, pieces, delivery)
        except Refused as refusal:
            self._refuse(received.header, delivery, refusal)

    def _start(self, message: Message, pieces: list[bytes], delivery: Delivery) -> None:
        """Store public keys, or start the evaluation of a query."""
        header = message.header
        if header.kind is Kind.KEYS:
            self._store_keys(header.sender, pieces)
            self._acknowledge(_parcel(header))
            return
        keys = self._read_keys(header.sender, str(message.scalars["keys"]))
        previous, blinding = str(message.scalars["blinding"]), f"{self._secret_name}/{secrets.token_hex(16)}"
        if header.version > 0 and previous.partition("/")[0] != self._secret_name:
            sentence = f"query {header.seq} of {header.sender} was begun by a server with another secret."
            raise Refused(315, sentence, "none; the site begins it again.")
        evaluation = self._evaluate(keys, header.version, str(message.scalars["packing"]), pieces, previous, blinding)
        self._evaluations[evaluation] = _Evaluation(header, delivery, blinding)

    def _send_answers(self) -> None:
        """Send the answers of finished evaluations."""
        for evaluation in [running for running in self._evaluations if running.done()]:
            header, delivery, blinding = self._evaluations.pop(evaluation)
            try:
                pieces = evaluation.result()
            except Refused as refusal:
                self._refuse(header, delivery, refusal)
                continue
            answer = self._mailbox.header(header.sender, Kind.ANSWER, header.seq, header.seq, header.version)
            for index, chunk in enumerate(chunks(answer, pieces, self._mailbox.message_bytes, {"blinding": blinding})):
                self._send(_parcel(header), chunk, index)
            self.answered += 1

    def _send(self, parcel: Parcel, message: Message, index: int) -> None:
        self._sent += 1
        name = f"{message.header.message_id}/{message.header.version}/{index}/{self._sent}"
        self._unconfirmed[self._mailbox.send(message, name)] = parcel

    def _refuse(self, header: Header, delivery: Delivery, refusal: Refused) -> None:
        """Put a copy of the chunk aside with the reason, and notify the site if it is a query."""
        self.refused += 1
        parcel = _parcel(header)
        if refusal.number not in (KEYS_UNKNOWN, BLINDED_ELSEWHERE):  # with these the site sends it again
            self._refused_parcels.add(parcel)
        self._unconfirmed[self._mailbox.dead_letter(delivery, refusal).copy] = parcel
        if header.kind is Kind.QUERY:
            notice = self._mailbox.header(header.sender, Kind.UNANSWERED, header.seq, header.seq, header.version)
            self._send(parcel, Message(notice, {}, {"number": refusal.number, "reason": str(refusal)}), 0)

    def _on_confirmed(self, name: str) -> None:
        if name in self._unidentified:
            self._mailbox.link.acknowledge(self._unidentified.pop(name))
            return
        parcel = self._unconfirmed.pop(name, None)
        if parcel is not None and parcel not in self._unconfirmed.values():
            self._acknowledge(parcel)

    def _acknowledge(self, parcel: Parcel) -> None:
        for delivery in self._unacknowledged.pop(parcel, []):
            self._mailbox.link.acknowledge(delivery)

    # -- public keys -------------------------------------------------------------------------------

    def _store_keys(self, site: str, pieces: list[bytes]) -> None:
        """Write a site's keys to its folder; Refused 313 unless they are keys of these parameters."""
        if len(pieces) != 2:
            raise mismatch(f"{len(pieces)} parts are no pair of keys.", 313)
        keys = PublicKeys(*pieces)
        Arithmetic(self._ckks, keys)  # checks them
        folder = self._keys / site
        make_private_folder(folder)
        write_atomic(folder / keys.sha256, keys.content)

    def _read_keys(self, site: str, sha256: str) -> PublicKeys:
        """Return a site's keys with this hash; Refused 314 when they are not stored here."""
        for path in (self._keys / site).glob("*"):
            if path.name == sha256:  # compared, and not made a part of a path: it came with a message
                return PublicKeys.of(path.read_bytes())
        sentence = f"keys {sha256[:12]} of {site} are not stored here."
        raise Refused(314, sentence, "none; the site sends them and the query again.")
