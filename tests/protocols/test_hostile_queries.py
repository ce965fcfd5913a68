"""Ten thousand hostile messages for encrypted queries: to the server and to the site, well-formed and extreme.

They lie in the queue beside genuine ones. Neither side ends with one: each is taken or put aside with a number, and
when all is over a genuine query is answered.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from nightsplit.broker.link_wrapper import LinkWrapper
from nightsplit.server_worker.protocols.he_clstm import HeClstmServer
from nightsplit.server_worker.query.server import QueryServer
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.protocols.query import BLINDED_ELSEWHERE, CHUNKS_MAX, CONTRACT, KEYS_UNKNOWN
from nightsplit.shared.transport import Event, Queue, Route
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire import head
from nightsplit.shared.wire.message import SERVER, Kind, Message, Scalar
from nightsplit.site_worker.query.client import QueryClient
from tests.protocols.test_queries import LIMIT, Service

MESSAGES = 10_000
AT_ONCE = 20
"""Hostile messages that a worker meets."""
SECRET = b"s" * 32


class Hasty(LinkWrapper):
    """Waits for nothing, and says whether anything came."""

    idle = False

    def receive(self, timeout: float) -> Event | None:
        event = super().receive(0.0)
        self.idle = event is None
        return event


class Liar:
    """Forges messages after genuine ones; every choice is the dice's."""

    def __init__(self, dice: random.Random, genuine: list[Message]) -> None:
        self.dice, self.genuine = dice, genuine
        self.sent = 0

    def forgery(self, seq: int) -> bytes:
        """A chunk as its receiver may wait for it, alone in its parcel more often than not."""
        dice, known = self.dice, self.dice.choice(self.genuine)
        self.sent += 1
        header = dataclasses.replace(known.header, seq=seq if known.header.seq else 0)
        for field in ("seq", "version", "reply_to"):
            if dice.random() < 0.15:
                header = dataclasses.replace(header, **{field: dice.choice((0, 1, 2, 7, 2**63 - 1))})
        payload = CONTRACT[header.kind]
        scalars = {name: self.scalar(name, value) for name, value in known.scalars.items()}
        tensors = {name: tensor if dice.random() < 0.1 else self.tensor(name) for name, tensor in known.tensors.items()}
        if tensors and dice.random() < 0.7:
            content = tensors["content"].numpy().tobytes()
            scalars |= {"chunk": 0, "chunks": 1, "sha256": hashlib.sha256(content).hexdigest()}
            if dice.random() < 0.7:
                first = dice.randint(0, len(content))
                tensors["sizes"] = torch.tensor([first, len(content) - first])
        return b"".join(bytes(part) for part in wire.encode(Message(header, tensors, scalars), payload, LIMIT))

    def scalar(self, name: str, known: Scalar) -> Scalar:
        if self.dice.random() < 0.6:
            return known
        extremes: dict[str, tuple[Scalar, ...]] = {
            "chunk": (0, 1, CHUNKS_MAX - 1), "chunks": (1, 2, CHUNKS_MAX), "packing": ("slots", "batch", "spiral"),
            "number": (101, 301, KEYS_UNKNOWN, BLINDED_ELSEWHERE, 615),
        }  # fmt: skip
        return self.dice.choice(extremes.get(name, ("", "/", "../../x", "\0" * 1000, "9" * 5000, "[" * 20_000)))

    def tensor(self, name: str) -> torch.Tensor:
        dice = self.dice
        if name == "content":
            return torch.frombuffer(bytearray(dice.randbytes(dice.choice((1, 16, 1000)))), dtype=torch.uint8)
        sizes: tuple[list[int], ...] = ([0], [-1, 1], [2**63 - 1, 1], [1] * 1000, [-(2**63)])
        return torch.tensor(dice.choice(sizes), dtype=torch.int64)


def lying(service: Service, queue: str) -> list[Message]:
    """The messages of a queue; it is empty then."""
    found: list[Message] = []

    def take(bodies: list[bytes]) -> list[bytes]:
        found.extend(wire.decode(body, CONTRACT[head.read_head(body).header.kind], LIMIT) for body in bodies)
        return []

    service.edit(queue, take)
    return found


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with closing(Service(tmp_path)) as service:
        yield service


def tell(service: Service, queue: Queue, bodies: list[bytes]) -> None:
    with service.broker.link([], 1, "liar") as link:
        for number, body in enumerate(bodies):
            link.publish(queue, str(number), [body])
        while link.unconfirmed:
            link.receive(0.1)


@pytest.mark.timeout(1200)
def test_whatever_is_said_to_the_server_it_answers_the_next_query(service: Service) -> None:
    service.submit()
    service.ask()
    genuine = lying(service, "up")
    assert {message.header.kind for message in genuine} == {Kind.KEYS, Kind.QUERY}
    liar, refused = Liar(random.Random("hostile queries"), genuine), 0
    while liar.sent < MESSAGES // 2:
        tell(service, service.names.up, [liar.forgery(liar.dice.randint(1, 5)) for _ in range(AT_ONCE)])
        with ThreadPoolExecutor(1) as pool, service.broker.link([service.names.up], 2 * CHUNKS_MAX, SERVER) as inner:
            link = Hasty(inner)
            route = {"north": Route(outgoing=service.names.down, incoming=service.names.up, dead=service.names.dead)}
            evaluate = partial(pool.submit, HeClstmServer(service.classifier, SECRET).answer)
            mailbox = Mailbox("film", SERVER, link, route, CONTRACT.get, LIMIT)
            server = QueryServer(mailbox, service.ckks, evaluate, SECRET.hex(), service.keys)
            server.run(lambda link=link, server=server: link.idle and not server._evaluations, None)
            refused += server.refused
        lying(service, "up")  # chunks that wait for others
    assert refused > MESSAGES // 10
    service.edit("down", lambda bodies: [])
    expect_an_answer(service)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_whatever_is_said_to_the_site_it_asks_the_next_query(service: Service) -> None:
    service.submit()
    service.ask()
    service.answer()
    genuine = lying(service, "down")
    refusal = dataclasses.replace(genuine[0].header, kind=Kind.UNANSWERED)
    genuine.append(Message(refusal, {}, {"number": 304, "reason": "no"}))
    liar = Liar(random.Random("hostile answers"), genuine)
    while liar.sent < MESSAGES // 2:
        numbers = [service.submit() for _ in range(AT_ONCE // 4)]
        tell(service, service.names.down, [liar.forgery(liar.dice.choice(numbers)) for _ in range(AT_ONCE)])
        with service.broker.link([service.names.down], 2 * CHUNKS_MAX, "north") as inner:
            link = Hasty(inner)
            routes = {SERVER: Route(outgoing=service.names.up, incoming=service.names.down, dead=service.names.dead)}
            mailbox = Mailbox("film", "north", link, routes, CONTRACT.get, LIMIT)
            QueryClient(mailbox, service.half, service.public, service.queries).run(lambda link=link: link.idle, None)
        for queue in ("up", "down"):
            service.edit(queue, lambda bodies: [])
    put_aside = service.broker.depth(service.names.dead)
    assert put_aside is not None
    assert put_aside > MESSAGES // 20, "the others came for queries that were refused by then"
    for place in service.queries.open():
        service.queries.save_refusal(place.number, "no more of it")
    expect_an_answer(service)


def expect_an_answer(service: Service) -> None:
    number = service.submit()
    service.settle()
    query = service.queries.get(number)
    assert query.refusal is None
    assert query.logits == pytest.approx(service.expected(), abs=1e-4)
