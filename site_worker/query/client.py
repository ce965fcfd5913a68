"""A site of the Query shape: sends what was submitted, and collects what has been answered, whenever either can be.

    submitted ──▶ formed ──▶ sent ──▶ answered                                                one_shot
    submitted ──▶ formed ──▶ sent ──▶ answered, next frame ──▶ sent ──▶ ... ──▶ answered      refresh

Each arrow is a durable change in the site's own file before the broker is told. A site that dies in between does
the step before once more: what it sends then is encrypted anew, and means the same; what it gets twice it drops.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from nightsplit.shared.engine.mailbox import Mailbox, PutAside, Received
from nightsplit.shared.errors import Refused
from nightsplit.shared.he.ckks import PublicKeys
from nightsplit.shared.protocols.query import BLINDED_ELSEWHERE, KEYS_UNKNOWN, Parcels, chunks
from nightsplit.shared.transport import Confirmed, Delivery
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.query.role import QueryRole
from nightsplit.site_worker.query.store import OpenQuery, Query, QueryStore

POLL_S = 0.5
"""How long it waits for a message before it looks whether it should leave."""
MOST_LEAVING = 2
"""QueryStore that are on their way to the broker at the same time: more would only fill the memory."""
_OF_KEYS = (0, 0)


class QueryClient:
    """Sends the queries of one site, and collects their answers; the only route of its mailbox is to the server."""

    def __init__(self, mailbox: Mailbox, role: QueryRole, keys: PublicKeys, queries: QueryStore) -> None:
        self._mailbox, self._role, self._public, self._queries = mailbox, role, keys, queries
        self._parcels = Parcels()
        self._held: defaultdict[tuple[int, int], list[Delivery]] = defaultdict(list)
        """Chunks of answers that are not complete."""
        self._leaving: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
        """Messages of a query that are not confirmed, by its number and step; of the public keys under `_OF_KEYS`."""
        self._aside: dict[str, Delivery] = {}
        """Answers that cannot be used, by the id of their copy in the dead letter queue."""
        self._sent = 0

    def run(self, leave: Callable[[], bool], idle_seconds: float | None) -> bool:
        """Work until every query is answered, `leave()` holds, or nothing happened for `idle_seconds`.

        Return whether every query is answered or refused.
        """
        last = time.monotonic()
        self._queries.form(self._public.sha256, self._role.packing_for)
        while not leave():
            waiting = self._queries.open()
            if not waiting and not self._aside:
                return True
            self._send_due(waiting)
            event = self._mailbox.link.receive(POLL_S)
            if isinstance(event, Delivery):
                self._take(event)
            elif isinstance(event, Confirmed):
                self._confirmed(event.message_id)
            if event is not None or any(self._leaving.values()):
                last = time.monotonic()
            elif idle_seconds is not None and time.monotonic() - last > idle_seconds:
                return False
        return False

    # -- what leaves -------------------------------------------------------------------------------

    def _send_due(self, waiting: Sequence[OpenQuery]) -> None:
        for place in waiting:
            if place.sent or self._leaving[place.number, place.step]:
                continue
            if sum(map(bool, self._leaving.values())) >= MOST_LEAVING:
                return
            query = self._queries.get(place.number)
            if not self._queries.is_announced(query.keys) and not self._leaving[_OF_KEYS]:
                header = Header(self._mailbox.run, self._mailbox.name, SERVER, Kind.KEYS, 1)
                keys = [self._public.relin, self._public.galois]
                self._publish(_OF_KEYS, chunks(header, keys, self._mailbox.message_bytes))
            header = Header(self._mailbox.run, self._mailbox.name, SERVER, Kind.QUERY, query.number, version=query.step)
            scalars = {"keys": query.keys, "packing": query.packing, "blinding": query.blinding}
            messages = chunks(header, self._role.pieces(query), self._mailbox.message_bytes, scalars)
            self._publish((query.number, query.step), messages)

    def _publish(self, parcel: tuple[int, int], messages: Iterable[Message]) -> None:
        for place, message in enumerate(messages):
            self._sent += 1
            name = f"{message.header.message_id}/{message.header.version}/{place}/{self._sent}"
            self._leaving[parcel].add(self._mailbox.send(message, name))

    def _confirmed(self, name: str) -> None:
        if name in self._aside:
            self._mailbox.link.acknowledge(self._aside.pop(name))
            return
        for parcel, names in self._leaving.items():
            if name in names:
                names.remove(name)
                if not names and parcel == _OF_KEYS:
                    self._queries.announced(self._public.sha256)
                elif not names:
                    self._queries.sent(*parcel)

    # -- what comes back ---------------------------------------------------------------------------

    def _take(self, delivery: Delivery) -> None:
        received = self._mailbox.receive(delivery)
        if isinstance(received, PutAside):
            self._aside[received.copy] = delivery
            return
        header = received.header
        if (header.seq, header.version) not in {(place.number, place.step) for place in self._queries.open()}:
            self._mailbox.link.acknowledge(delivery)  # a copy of what has been taken
            return
        query = self._queries.get(header.seq)
        try:
            complete = self._take_chunk(query, received)
        except Refused as refusal:
            self._queries.refused(query.number, str(refusal))
            self._aside[self._mailbox.put_aside(delivery, refusal).copy] = delivery
            return
        if complete:
            for held in self._held.pop((header.seq, header.version)):
                self._mailbox.link.acknowledge(held)

    def _take_chunk(self, query: Query, received: Received) -> bool:
        """Take a chunk of an answer; whether it was the last one missing."""
        header, message = received.header, self._mailbox.open(received)
        self._held[header.seq, header.version].append(received.delivery)
        if header.kind is Kind.UNANSWERED:
            self._unanswered(query, message)
            return True
        pieces = self._parcels.add(message)
        if pieces is None:
            return False
        if query.step == self._role.steps - 1:
            self._queries.answered(query.number, self._role.logits(query, pieces))
        else:
            state, blinding = self._role.state(query, pieces), str(message.scalars["blinding"])
            self._queries.advance(query.number, query.step + 1, state, blinding)
        return True

    def _unanswered(self, query: Query, message: Message) -> None:
        if message.scalars["number"] == KEYS_UNKNOWN:
            self._queries.forgotten(query.keys)
        elif message.scalars["number"] == BLINDED_ELSEWHERE:
            self._queries.begin_again(query.number)
        else:
            self._queries.refused(query.number, str(message.scalars["reason"]))
