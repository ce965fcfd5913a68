"""The client of the Query shape: sends submitted queries and collects their answers.

    submitted ──▶ formed ──▶ sent ──▶ answered                                                one_shot
    submitted ──▶ formed ──▶ sent ──▶ answered, next frame ──▶ sent ──▶ ... ──▶ answered      refresh

Each arrow is a durable change in the site's own file, made before the broker is told. After a crash in between, the
site repeats the last step: it sends a new encryption of the same numbers, and drops answers that come twice.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from nightsplit.shared.engine.mailbox import DeadLetter, Mailbox, Received
from nightsplit.shared.errors import Refused
from nightsplit.shared.he.ckks import PublicKeys
from nightsplit.shared.protocols.query import BLINDED_ELSEWHERE, KEYS_UNKNOWN, Parcels, chunks
from nightsplit.shared.transport import Confirmed, Delivery
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.query.role import QueryRole
from nightsplit.site_worker.query.store import OpenQuery, Query, QueryStore

POLL_S = 0.5
"""Longest wait for a message, in seconds, before `should_leave` is called again."""
SENDS_MAX = 2
"""Most queries with unconfirmed messages at a time: more would only fill the memory."""
_KEYS_PARCEL = (0, 0)


class QueryClient:
    """Client that sends a site's queries and collects the answers; the mailbox has one route, to the server."""

    def __init__(self, mailbox: Mailbox, role: QueryRole, keys: PublicKeys, queries: QueryStore) -> None:
        self._mailbox, self._role, self._public, self._queries = mailbox, role, keys, queries
        self._parcels = Parcels()
        self._chunks: defaultdict[tuple[int, int], list[Delivery]] = defaultdict(list)
        """Chunks of incomplete answers."""
        self._unconfirmed: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
        """Unconfirmed messages by a query's number and step; those of the public keys under `_KEYS_PARCEL`."""
        self._dead_letters: dict[str, Delivery] = {}
        """Refused answers by the id of their unconfirmed copy in the dead letter queue."""
        self._sent = 0

    def run(self, should_leave: Callable[[], bool], idle_seconds: float | None) -> bool:
        """Work until every query is answered, `should_leave()` is true, or `idle_seconds` pass without an event.

        Return whether every query is answered or refused.
        """
        last = time.monotonic()
        self._queries.form(self._public.sha256, self._role.packing_for)
        while not should_leave():
            waiting = self._queries.open()
            if not waiting and not self._dead_letters:
                return True
            self._send_due(waiting)
            event = self._mailbox.link.receive(POLL_S)
            if isinstance(event, Delivery):
                self._handle_delivery(event)
            elif isinstance(event, Confirmed):
                self._handle_confirm(event.message_id)
            if event is not None or any(self._unconfirmed.values()):
                last = time.monotonic()
            elif idle_seconds is not None and time.monotonic() - last > idle_seconds:
                return False
        return False

    # -- sending -----------------------------------------------------------------------------------

    def _send_due(self, waiting: Sequence[OpenQuery]) -> None:
        for open_query in waiting:
            if open_query.sent or self._unconfirmed[open_query.number, open_query.step]:
                continue
            if len([names for names in self._unconfirmed.values() if names]) >= SENDS_MAX:
                return
            query = self._queries.get(open_query.number)
            if not self._queries.has_sent_keys(query.keys) and not self._unconfirmed[_KEYS_PARCEL]:
                header = Header(self._mailbox.run, self._mailbox.name, SERVER, Kind.KEYS, 1)
                keys = [self._public.relin, self._public.galois]
                self._publish(_KEYS_PARCEL, chunks(header, keys, self._mailbox.message_bytes))
            header = Header(self._mailbox.run, self._mailbox.name, SERVER, Kind.QUERY, query.number, version=query.step)
            scalars = {"keys": query.keys, "packing": query.packing, "blinding": query.blinding}
            messages = chunks(header, self._role.encrypt_step(query), self._mailbox.message_bytes, scalars)
            self._publish((query.number, query.step), messages)

    def _publish(self, parcel: tuple[int, int], messages: Iterable[Message]) -> None:
        for chunk, message in enumerate(messages):
            self._sent += 1
            name = f"{message.header.message_id}/{message.header.version}/{chunk}/{self._sent}"
            self._unconfirmed[parcel].add(self._mailbox.send(message, name))

    def _handle_confirm(self, name: str) -> None:
        if name in self._dead_letters:
            self._mailbox.link.acknowledge(self._dead_letters.pop(name))
            return
        for parcel, names in self._unconfirmed.items():
            if name in names:
                names.remove(name)
                if not names and parcel == _KEYS_PARCEL:
                    self._queries.mark_keys_sent(self._public.sha256)
                elif not names:
                    self._queries.mark_sent(*parcel)

    # -- receiving ---------------------------------------------------------------------------------

    def _handle_delivery(self, delivery: Delivery) -> None:
        received = self._mailbox.receive(delivery)
        if isinstance(received, DeadLetter):
            self._dead_letters[received.copy] = delivery
            return
        header = received.header
        if (header.seq, header.version) not in {(query.number, query.step) for query in self._queries.open()}:
            self._mailbox.link.acknowledge(delivery)  # a duplicate
            return
        query = self._queries.get(header.seq)
        try:
            is_complete = self._add_chunk(query, received)
        except Refused as refusal:
            self._queries.save_refusal(query.number, str(refusal))
            self._dead_letters[self._mailbox.dead_letter(delivery, refusal).copy] = delivery
            return
        if is_complete:
            for chunk in self._chunks.pop((header.seq, header.version)):
                self._mailbox.link.acknowledge(chunk)

    def _add_chunk(self, query: Query, received: Received) -> bool:
        """Add a chunk to an answer; return whether the answer is complete."""
        header, message = received.header, self._mailbox.open(received)
        self._chunks[header.seq, header.version].append(received.delivery)
        if header.kind is Kind.UNANSWERED:
            self._handle_unanswered(query, message)
            return True
        pieces = self._parcels.add(message)
        if pieces is None:
            return False
        if query.step == self._role.steps - 1:
            self._queries.save_logits(query.number, self._role.decrypt_logits(query, pieces))
        else:
            state, blinding = self._role.decrypt_state(query, pieces), str(message.scalars["blinding"])
            self._queries.advance(query.number, query.step + 1, state, blinding)
        return True

    def _handle_unanswered(self, query: Query, message: Message) -> None:
        if message.scalars["number"] == KEYS_UNKNOWN:
            self._queries.mark_keys_unsent(query.keys)
        elif message.scalars["number"] == BLINDED_ELSEWHERE:
            self._queries.restart(query.number)
        else:
            self._queries.save_refusal(query.number, str(message.scalars["reason"]))
