"""A server of the Query shape: takes queries as they come, answers them, and keeps nothing but public keys.

    chunks come in ──▶ a parcel is whole ──▶ answer published ──▶ answer confirmed ──▶ chunks acknowledged

Until the last step the broker has the query: a server that dies before it is answered by the next one. So any
number of servers may stand by, and a second answer to the same query does no harm.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from broker.base import Confirmed, Delivery, Link
from server_worker.encrypted.arithmetic import Arithmetic
from server_worker.protocols.he_clstm import HeClstmServer
from shared import wire
from shared.checkpoint import force_to_disk
from shared.ckks import PublicKeys
from shared.dead_letter import bury
from shared.errors import Refused
from shared.message import SERVER, Header, Kind, Message
from shared.protocols.query import CONTRACT, KEYS_UNKNOWN, Parcels, chunks
from shared.route import Route

POLL_S = 0.5
"""How long it waits for a message before it looks whether it should leave."""

Parcel = tuple[str, Kind, int, int]
"""Site, kind, number and step."""


class Answering:
    """The loop of one server process.

    Args:
        run: id of the run whose model answers.
        link: consumes every site's queue of queries.
        routes: of the sites.
        half: evaluates.
        keys: folder of the sites' public keys.
        message_bytes: largest message.
    """

    def __init__(
        self, run: str, link: Link, routes: Mapping[str, Route], half: HeClstmServer, keys: Path, message_bytes: int
    ) -> None:
        self._run, self._link, self._routes, self._half = run, link, routes, half
        self._keys, self._message_bytes = keys, message_bytes
        self._senders = {route.incoming.name: site for site, route in routes.items()}
        self._parcels = {site: Parcels() for site in routes}
        self._held: defaultdict[Parcel, list[Delivery]] = defaultdict(list)
        """Chunks of parcels that are not dealt with."""
        self._leaving: dict[str, Parcel] = {}
        """Messages that are not confirmed, and whose parcel they answer."""
        self._given_up: set[Parcel] = set()
        """Parcels of which a chunk was refused: the others are let go."""
        self._sent = 0
        self.answered = 0
        """Queries, each step counted."""
        self.refused = 0

    def run(self, leave: Callable[[], bool], idle_seconds: float | None) -> None:
        """Answer until `leave()` holds, or nothing came for `idle_seconds`."""
        last = time.monotonic()
        while not leave():
            event = self._link.receive(POLL_S)
            if isinstance(event, Delivery):
                self._take(event)
            elif isinstance(event, Confirmed):
                self._confirmed(event.message_id)
            if event is not None or self._leaving:
                last = time.monotonic()
            elif idle_seconds is not None and time.monotonic() - last > idle_seconds:
                return

    def _take(self, delivery: Delivery) -> None:
        site, header = self._senders[delivery.queue], None
        try:
            found = wire.peek(delivery.body)
            expected = (self._run, site, SERVER)
            if (found.run, found.sender, found.receiver) != expected or not delivery.may_be_from(site):
                raise Refused(
                    310,
                    f"{found.message_id} came through {delivery.queue}{delivery.by}.",
                    "check which worker publishes to that queue.",
                )
            header = found  # the site is told of its own messages alone
            if header.kind not in (Kind.KEYS, Kind.QUERY):
                raise Refused(303, f"{header.kind} from {site} is not used here.", "run one version at both.")
            parcel = (site, header.kind, header.seq, header.version)
            if parcel in self._given_up:
                self._link.acknowledge(delivery)
                return
            self._held[parcel].append(delivery)
            message = wire.decode(delivery.body, CONTRACT[header.kind], self._message_bytes)
            pieces = self._parcels[site].add(message)
            if pieces is not None:
                self._deal_with(parcel, message, pieces)
        except Refused as refusal:
            self._refuse(site, header, delivery, refusal)

    def _deal_with(self, parcel: Parcel, message: Message, pieces: list[bytes]) -> None:
        site, kind, number, step = parcel
        if kind is Kind.KEYS:
            self._keep_keys(site, pieces)
            self._acknowledge(parcel)
            return
        sha256 = str(message.scalars["keys"])
        keys = self._known(site, sha256)
        query = f"{self._run}/{site}/{sha256}/{number}"
        answer = self._half.answer(keys, query, step, str(message.scalars["packing"]), pieces)
        header = Header(self._run, SERVER, site, Kind.ANSWER, number, reply_to=number, version=step)
        for place, chunk in enumerate(chunks(header, answer, self._message_bytes)):
            self._send(parcel, chunk, place)
        self.answered += 1

    def _send(self, parcel: Parcel, message: Message, place: int) -> None:
        self._sent += 1
        name = f"{message.header.message_id}/{message.header.version}/{place}/{self._sent}"
        body = wire.encode(message, CONTRACT[message.header.kind], self._message_bytes)
        self._leaving[name] = parcel
        self._link.publish(self._routes[parcel[0]].outgoing, name, body)

    def _refuse(self, site: str, header: Header | None, delivery: Delivery, refusal: Refused) -> None:
        """Keep a copy of the chunk with the reason, and tell the site, if it is a query that can be named."""
        self.refused += 1
        kind, number, step = (header.kind, header.seq, header.version) if header else (Kind.QUERY, 0, 0)
        parcel = (site, kind, number, step)
        if delivery not in self._held[parcel]:
            self._held[parcel].append(delivery)
        if refusal.number != KEYS_UNKNOWN:  # then the site sends it once more
            self._given_up.add(parcel)
        name = f"dead/{delivery.message_id}/{self.refused}"
        self._leaving[name] = parcel
        bury(self._link, self._routes[site].dead, name, delivery, site, refusal)
        if header is not None and kind is Kind.QUERY:
            told = Header(self._run, SERVER, site, Kind.UNANSWERED, number, reply_to=number, version=step)
            self._send(parcel, Message(told, {}, {"number": refusal.number, "reason": str(refusal)}), 0)

    def _confirmed(self, name: str) -> None:
        parcel = self._leaving.pop(name, None)
        if parcel is not None and parcel not in self._leaving.values():
            self._acknowledge(parcel)

    def _acknowledge(self, parcel: Parcel) -> None:
        for delivery in self._held.pop(parcel, []):
            self._link.acknowledge(delivery)

    # -- public keys -------------------------------------------------------------------------------

    def _keep_keys(self, site: str, pieces: list[bytes]) -> None:
        """Write a site's keys, once they are seen to be keys of this circuit."""
        if len(pieces) != 2:
            raise Refused(313, f"{len(pieces)} parts are no pair of keys.", "run the same version at both sides.")
        keys = PublicKeys(*pieces)
        Arithmetic(self._half.circuit, keys)
        folder = self._keys / site
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{keys.sha256}.draft"
        draft.write_bytes(keys.content)
        force_to_disk(draft)
        draft.replace(folder / keys.sha256)

    def _known(self, site: str, sha256: str) -> PublicKeys:
        """The keys of a site that have this name.

        Raises:
            Refused: 314 they are not here.
        """
        for path in (self._keys / site).glob("*"):
            if path.name == sha256:  # compared, and not made a part of a path: it came with a message
                return PublicKeys.of(path.read_bytes())
        raise Refused(
            314,
            f"keys {sha256[:12]} of {site} are not here.",
            "none; the site sends them and the query again.",
        )
