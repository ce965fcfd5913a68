"""A server of the Query shape: takes queries as they come, answers them, and keeps nothing but public keys.

    chunks come in ──▶ parcel whole ──▶ evaluated ──▶ answer published ──▶ answer confirmed ──▶ chunks acknowledged
                                     (several at once)

Until the last step the broker has the query: a server that dies before it is answered by the next one. So any
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
from nightsplit.shared.engine.mailbox import Mailbox, PutAside
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.he.ckks import CkksParameters, PublicKeys
from nightsplit.shared.protocols.query import BLINDED_ELSEWHERE, KEYS_UNKNOWN, Parcels, chunks
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.transport import Confirmed, Delivery
from nightsplit.shared.wire.message import Header, Kind, Message

POLL_S = 0.5
"""How long it waits for a message before it looks whether it should leave."""
SOON_S = 0.01
"""How long before it looks for an evaluation that has ended."""

Parcel = tuple[str, Kind, int, int]
"""Site, kind, number and step."""


def _parcel(header: Header) -> Parcel:
    return header.sender, header.kind, header.seq, header.version


class _Evaluation(NamedTuple):
    """Of a query, by its header and the last of its chunks; `blinding` is that of its answer."""

    header: Header
    delivery: Delivery
    blinding: str


class QueryServer:
    """Answers the queries of all sites, in one process.

    Args:
        mailbox: of the server.
        ckks: of the queries.
        evaluate: begins the evaluation of a query.
        secret_name: names the secret that states are blinded with.
        keys: folder of the sites' public keys.
    """

    def __init__(
        self, mailbox: Mailbox, ckks: CkksParameters, evaluate: Evaluate, secret_name: str, keys: Path
    ) -> None:
        self._mailbox, self._ckks, self._evaluate = mailbox, ckks, evaluate
        self._secret_name, self._keys = secret_name, keys
        self._parcels = {site: Parcels() for site in mailbox.routes}
        self._held: defaultdict[Parcel, list[Delivery]] = defaultdict(list)
        """Chunks of parcels that are not dealt with."""
        self._evaluations: dict[Future[list[bytes]], _Evaluation] = {}
        self._leaving: dict[str, Parcel] = {}
        """Messages that are not confirmed, and whose parcel they answer."""
        self._aside: dict[str, Delivery] = {}
        """Messages of nobody, by the id of their copy in the dead letter queue."""
        self._given_up: set[Parcel] = set()
        """Parcels of which a chunk was refused: the others are let go."""
        self._sent = 0
        self.answered = 0
        """QueryStore, each step counted."""
        self.refused = 0

    def run(self, leave: Callable[[], bool], idle_seconds: float | None) -> None:
        """Answer until `leave()` holds, or nothing came for `idle_seconds`; StateError 509: a process is gone."""
        last = time.monotonic()
        while not leave():
            event = self._mailbox.link.receive(SOON_S if self._evaluations else POLL_S)
            if isinstance(event, Delivery):
                self._take(event)
            elif isinstance(event, Confirmed):
                self._confirmed(event.message_id)
            self._answer()
            if event is not None or self._leaving or self._evaluations:
                last = time.monotonic()
            elif idle_seconds is not None and time.monotonic() - last > idle_seconds:
                return

    def _take(self, delivery: Delivery) -> None:
        received = self._mailbox.receive(delivery)
        if isinstance(received, PutAside):
            self.refused += 1
            self._aside[received.copy] = delivery
            return
        parcel = _parcel(received.header)
        if parcel in self._given_up:
            self._mailbox.link.acknowledge(delivery)
            return
        self._held[parcel].append(delivery)
        try:
            message = self._mailbox.open(received)
            pieces = self._parcels[received.header.sender].add(message)
            if pieces is not None:
                self._begin(message, pieces, delivery)
        except Refused as refusal:
            self._refuse(received.header, delivery, refusal)

    def _begin(self, message: Message, pieces: list[bytes], delivery: Delivery) -> None:
        """Keep public keys, or begin with a query."""
        header = message.header
        if header.kind is Kind.KEYS:
            self._keep_keys(header.sender, pieces)
            self._acknowledge(_parcel(header))
            return
        keys = self._known(header.sender, str(message.scalars["keys"]))
        before, after = str(message.scalars["blinding"]), f"{self._secret_name}/{secrets.token_hex(16)}"
        if header.version > 0 and before.partition("/")[0] != self._secret_name:
            what = f"query {header.seq} of {header.sender} was begun by a server with another secret."
            raise Refused(315, what, "none; the site begins it again.")
        evaluation = self._evaluate(keys, header.version, str(message.scalars["packing"]), pieces, before, after)
        self._evaluations[evaluation] = _Evaluation(header, delivery, after)

    def _answer(self) -> None:
        """Send what has been evaluated."""
        for evaluation in [one for one in self._evaluations if one.done()]:
            header, delivery, blinding = self._evaluations.pop(evaluation)
            try:
                pieces = evaluation.result()
            except Refused as refusal:
                self._refuse(header, delivery, refusal)
                continue
            told = self._mailbox.header(header.sender, Kind.ANSWER, header.seq, header.seq, header.version)
            for place, chunk in enumerate(chunks(told, pieces, self._mailbox.message_bytes, {"blinding": blinding})):
                self._send(_parcel(header), chunk, place)
            self.answered += 1

    def _send(self, parcel: Parcel, message: Message, place: int) -> None:
        self._sent += 1
        name = f"{message.header.message_id}/{message.header.version}/{place}/{self._sent}"
        self._leaving[self._mailbox.send(message, name)] = parcel

    def _refuse(self, header: Header, delivery: Delivery, refusal: Refused) -> None:
        """Keep a copy of the chunk with the reason, and tell the site, if it is a query."""
        self.refused += 1
        parcel = _parcel(header)
        if refusal.number not in (KEYS_UNKNOWN, BLINDED_ELSEWHERE):  # then the site sends it once more
            self._given_up.add(parcel)
        self._leaving[self._mailbox.put_aside(delivery, refusal).copy] = parcel
        if header.kind is Kind.QUERY:
            told = self._mailbox.header(header.sender, Kind.UNANSWERED, header.seq, header.seq, header.version)
            self._send(parcel, Message(told, {}, {"number": refusal.number, "reason": str(refusal)}), 0)

    def _confirmed(self, name: str) -> None:
        if name in self._aside:
            self._mailbox.link.acknowledge(self._aside.pop(name))
            return
        parcel = self._leaving.pop(name, None)
        if parcel is not None and parcel not in self._leaving.values():
            self._acknowledge(parcel)

    def _acknowledge(self, parcel: Parcel) -> None:
        for delivery in self._held.pop(parcel, []):
            self._mailbox.link.acknowledge(delivery)

    # -- public keys -------------------------------------------------------------------------------

    def _keep_keys(self, site: str, pieces: list[bytes]) -> None:
        """Write a site's keys, once they are seen to be keys of these parameters."""
        if len(pieces) != 2:
            raise mismatch(f"{len(pieces)} parts are no pair of keys.", 313)
        keys = PublicKeys(*pieces)
        Arithmetic(self._ckks, keys)
        folder = self._keys / site
        make_private_folder(folder)
        write_atomic(folder / keys.sha256, keys.content)

    def _known(self, site: str, sha256: str) -> PublicKeys:
        """The keys of a site that have this name; Refused 314 where they are not here."""
        for path in (self._keys / site).glob("*"):
            if path.name == sha256:  # compared, and not made a part of a path: it came with a message
                return PublicKeys.of(path.read_bytes())
        what = f"keys {sha256[:12]} of {site} are not here."
        raise Refused(314, what, "none; the site sends them and the query again.")
