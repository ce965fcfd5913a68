"""A site of the Query shape: sends what was submitted, and collects what has been answered, whenever either can be.

    submitted ──▶ formed ──▶ sent ──▶ answered                                                one_shot
    submitted ──▶ formed ──▶ sent ──▶ answered, next frame ──▶ sent ──▶ ... ──▶ answered      refresh

Each arrow is a durable change in the site's own file before the broker is told. A site that dies in between does
the step before once more: what it sends then is encrypted anew, and means the same; what it gets twice it drops.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from nightsplit.shared.engine.dead_letter import bury
from nightsplit.shared.errors import Refused
from nightsplit.shared.he.ckks import PublicKeys
from nightsplit.shared.protocols.query import BLINDED_ELSEWHERE, CONTRACT, KEYS_UNKNOWN, Parcels, chunks
from nightsplit.shared.transport import Confirmed, Delivery, Link, Route
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.query.role import QueryRole
from nightsplit.site_worker.query.store import Place, Queries, Query

POLL_S = 0.5
"""How long it waits for a message before it looks whether it should leave."""
MOST_LEAVING = 2
"""Queries that are on their way to the broker at the same time: more would only fill the memory."""
_OF_KEYS = (0, 0)


class Asking:
    """The loop of one site.

    Args:
        run: id of the run whose model is asked.
        site: name of the site.
        link: consumes the site's queue of answers.
        route: to the server.
        half: encrypts and decrypts.
        keys: the site's public ones.
        queries: what was submitted.
        message_bytes: largest message.
    """

    def __init__(
        self, run: str, site: str, link: Link, route: Route, half: QueryRole, keys: PublicKeys, queries: Queries,
        message_bytes: int,
    ) -> None:  # fmt: skip
        self._run, self._site, self._link, self._route, self._half = run, site, link, route, half
        self._public, self._queries, self._message_bytes = keys, queries, message_bytes
        self._parcels = Parcels()
        self._held: defaultdict[tuple[int, int], list[Delivery]] = defaultdict(list)
        """Chunks of answers that are not complete."""
        self._leaving: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
        """Messages of a query that are not confirmed, by its number and step; of the public keys under `_OF_KEYS`."""
        self._burying: dict[str, Delivery] = {}
        """Answers that cannot be used, by the name of their copy in the dead letter queue."""
        self._sent = 0

    def run(self, leave: Callable[[], bool], idle_seconds: float | None) -> bool:
        """Work until every query is answered, `leave()` holds, or nothing happened for `idle_seconds`.

        Returns:
            Whether every query is answered or refused.
        """
        last = time.monotonic()
        self._queries.form(self._public.sha256, self._half.packing_for)
        while not leave():
            waiting = self._queries.open()
            if not waiting and not self._burying:
                return True
            self._send_due(waiting)
            event = self._link.receive(POLL_S)
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

    def _send_due(self, waiting: Sequence[Place]) -> None:
        for place in waiting:
            if place.sent or self._leaving[place.number, place.step]:
                continue
            if sum(map(bool, self._leaving.values())) >= MOST_LEAVING:
                return
            query = self._queries.get(place.number)
            if not self._queries.is_announced(query.keys) and not self._leaving[_OF_KEYS]:
                header = Header(self._run, self._site, SERVER, Kind.KEYS, 1)
                self._publish(_OF_KEYS, chunks(header, [self._public.relin, self._public.galois], self._message_bytes))
            header = Header(self._run, self._site, SERVER, Kind.QUERY, query.number, version=query.step)
            scalars = {"keys": query.keys, "packing": query.packing, "blinding": query.blinding}
            messages = chunks(header, self._half.pieces(query), self._message_bytes, scalars)
            self._publish((query.number, query.step), messages)

    def _publish(self, parcel: tuple[int, int], messages: Iterable[Message]) -> None:
        for place, message in enumerate(messages):
            self._sent += 1
            name = f"{message.header.message_id}/{message.header.version}/{place}/{self._sent}"
            body = wire.encode(message, CONTRACT[message.header.kind], self._message_bytes)
            self._leaving[parcel].add(name)
            self._link.publish(self._route.outgoing, name, body)

    def _confirmed(self, name: str) -> None:
        if name in self._burying:
            self._link.acknowledge(self._burying.pop(name))
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
        query = None
        try:
            header = wire.peek(delivery.body)
            expected = (self._run, SERVER, self._site)
            if (header.run, header.sender, header.receiver) != expected or not delivery.may_be_from(SERVER):
                raise Refused(
                    310,
                    f"{header.message_id} came through {delivery.queue}{delivery.by}.",
                    "check which worker publishes to that queue.",
                )
            if header.kind not in (Kind.ANSWER, Kind.UNANSWERED):
                raise Refused(303, f"{header.kind} from the server is not used here.", "run one version at both.")
            if (header.seq, header.version) not in {(place.number, place.step) for place in self._queries.open()}:
                self._link.acknowledge(delivery)  # a copy of what has been taken
                return
            query = self._queries.get(header.seq)
            message = wire.decode(delivery.body, CONTRACT[header.kind], self._message_bytes)
            self._held[header.seq, header.version].append(delivery)
            if header.kind is Kind.UNANSWERED:
                self._unanswered(query, message)
            else:
                pieces = self._parcels.add(message)
                if pieces is None:
                    return
                self._answered(query, pieces, str(message.scalars["blinding"]))
            for held in self._held.pop((header.seq, header.version)):
                self._link.acknowledge(held)
        except Refused as refusal:
            if query is not None:
                self._queries.refused(query.number, str(refusal))
            name = f"dead/{delivery.message_id}/{self._sent}"
            self._sent += 1
            self._burying[name] = delivery
            bury(self._link, self._route.dead, name, delivery, SERVER, refusal)

    def _answered(self, query: Query, pieces: list[bytes], blinding: str) -> None:
        if query.step == self._half.steps - 1:
            self._queries.answered(query.number, self._half.logits(query, pieces))
        else:
            self._queries.advance(query.number, query.step + 1, self._half.state(query, pieces), blinding)

    def _unanswered(self, query: Query, message: Message) -> None:
        if message.scalars["number"] == KEYS_UNKNOWN:
            self._queries.forgotten(query.keys)
        elif message.scalars["number"] == BLINDED_ELSEWHERE:
            self._queries.begin_again(query.number)
        else:
            self._queries.refused(query.number, str(message.scalars["reason"]))
