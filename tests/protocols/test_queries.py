"""The Query shape over a broker in memory: real halves and real ciphertexts; copies, losses, garbage, unknown keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nightsplit.broker.topology import query_queues
from nightsplit.server_worker.protocols.he_clstm import HeClstmServer
from nightsplit.server_worker.query.pool import Evaluate
from nightsplit.server_worker.query.server import QueryServer
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import Refused, StateError
from nightsplit.shared.he.sequences import parameters_for, rotations_of
from nightsplit.shared.he.weights import ClassifierWeights, FloatArray
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.shared.protocols.query import CHUNKS_MAX, CONTRACT, HEADER_BYTES, Parcels, chunks
from nightsplit.shared.transport import Delivery, Route
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.site_worker.protocols.he_clstm import HeClstmSite
from nightsplit.site_worker.query.client import QueryClient
from nightsplit.site_worker.query.keys import SecretKeys
from nightsplit.site_worker.query.store import QueryStore

FRAMES, FEATURES, HIDDEN = 2, 2, 1
LIMIT = HEADER_BYTES + 100_000
"""A ciphertext has more than 100 KB, so that each query has several chunks."""


class Service:
    """One site and one server, either of which can be there or not."""

    def __init__(self, folder: Path, recurrent: bool = True) -> None:
        torch.manual_seed(2)
        self.network = SequenceClassifier(FRAMES, FEATURES, HIDDEN, recurrent).double()
        self.classifier = ClassifierWeights.of(self.network.state_dict())
        self.ckks = parameters_for(self.classifier)
        secret, self.public = SecretKeys.make(self.ckks, folder / "site", rotations_of(self.ckks, self.classifier))
        self.queries = QueryStore(folder / "queries.db")
        self.half = HeClstmSite(self.classifier, secret)
        self.broker, self.names = MemoryBroker(), query_queues("film", "north", 2**30)
        self.broker.declare(self.names)
        self.keys = folder / "server"
        self.features = np.tanh(np.random.default_rng(1).normal(size=(3, FRAMES, FEATURES)))

    def close(self) -> None:
        self.queries.close()

    def submit(self) -> int:
        """The number of the query that these sequences are."""
        self.queries.submit(["a", "b", "c"], self.features)
        self.queries.form(self.public.sha256, self.half.packing_for)
        return self.queries.open()[-1].number

    def answer(self, evaluate: Evaluate | None = None, secret: bytes = b"s" * 32) -> QueryServer:
        """The server alone, until nothing comes; it evaluates in threads of this process."""
        names = self.names
        with ThreadPoolExecutor(2) as pool, self.broker.link([names.up], 2 * CHUNKS_MAX, SERVER) as link:
            route = {"north": Route(outgoing=names.down, incoming=names.up, dead=names.dead)}
            in_threads = partial(pool.submit, HeClstmServer(self.classifier, secret).answer)
            evaluate, name = evaluate or in_threads, secret.hex()
            mailbox = Mailbox("film", SERVER, link, route, CONTRACT.get, LIMIT)
            server = QueryServer(mailbox, self.ckks, evaluate, name, self.keys)
            server.run(lambda: False, 0.05)
        return server

    def ask(self) -> bool:
        """The site alone, until nothing comes; whether all is over."""
        names = self.names
        with self.broker.link([names.down], 2 * CHUNKS_MAX, "north") as link:
            routes = {SERVER: Route(outgoing=names.up, incoming=names.down, dead=names.dead)}
            mailbox = Mailbox("film", "north", link, routes, CONTRACT.get, LIMIT)
            return QueryClient(mailbox, self.half, self.public, self.queries).run(lambda: False, 0.05)

    def settle(self) -> None:
        for _ in range(20):
            if self.ask():
                return
            self.answer()
        raise AssertionError("queries stay open")

    def expected(self) -> FloatArray:
        with torch.no_grad():
            scores: FloatArray = self.network(torch.tensor(self.features))[:, 0].numpy()
        return scores

    def expect_scores(self) -> None:
        """Each query has the scores of the classifier in the clear."""
        expected = self.expected()
        for query in self.queries.all():
            assert query.logits is not None
            np.testing.assert_allclose(query.logits, expected, atol=1e-4)

    def edit(self, queue: str, change: Callable[[list[bytes]], list[bytes]]) -> None:
        """Change what lies in a queue."""
        found = getattr(self.names, queue)
        with self.broker.link([found], 10_000, "thief") as link:
            bodies = []
            while (event := link.receive(0.0)) is not None:
                assert isinstance(event, Delivery)
                bodies.append(bytes(event.body))
                link.acknowledge(event)
            for number, body in enumerate(change(bodies)):
                link.publish(found, f"again/{number}", [body])
            while link.unconfirmed:
                link.receive(0.1)


@pytest.fixture(
    params=[pytest.param(True, id="refresh"), pytest.param(False, id="one_shot", marks=pytest.mark.campaign)]
)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with closing(Service(tmp_path, request.param)) as service:
        yield service


def test_queries_in_chunks_are_answered(service: Service) -> None:
    service.submit()
    service.submit()
    assert not service.ask()
    depth = service.broker.depth(service.names.up)
    assert depth is not None
    assert depth > 4, "each of them, and the keys, in several chunks"
    service.settle()
    service.expect_scores()
    assert service.broker.depth(service.names.up) == 0
    assert service.broker.depth(service.names.down) == 0


def test_what_waits_is_asked_together(service: Service) -> None:
    """As one query, in the packing that suits the sum; scores come by submission."""
    for _ in range(3):
        service.queries.submit(["a", "b,c", "d"], service.features)
    assert service.queries.count_waiting() == 9
    service.settle()
    (query,) = service.queries.all()
    assert service.queries.count_waiting() == 0
    assert [tuple(origin) for origin in query.origins[2:5]] == [(1, 3, "d"), (2, 1, "a"), (2, 2, "b,c")]
    assert query.logits is not None
    np.testing.assert_allclose(query.logits, np.tile(service.expected(), 3), atol=1e-4)


def test_the_packing_follows_what_waits(service: Service) -> None:
    """Few sequences go in slots, where the model allows it; many in batches."""
    many = np.tile(service.features, (250, 1, 1))
    service.queries.submit(["p"] * len(service.features), service.features)
    service.queries.form(service.public.sha256, service.half.packing_for)
    for _ in range(2):
        service.queries.submit(["p"] * len(many), many)
    service.queries.form(service.public.sha256, service.half.packing_for)
    recurrent = service.classifier.state is not None
    assert [(query.packing, len(query.origins)) for query in service.queries.all()] == [
        ("slots" if recurrent else "batch", 3), ("batch", 1500),
    ]  # fmt: skip


def test_copies_change_nothing(service: Service) -> None:
    service.submit()
    service.ask()
    service.edit("up", lambda bodies: [copy for body in bodies for copy in (body, body)])
    service.answer()
    service.edit("down", lambda bodies: [*bodies, *bodies])
    service.settle()
    service.expect_scores()


def test_a_site_that_dies_before_the_confirm_asks_again(service: Service) -> None:
    """What it sends then is encrypted anew; of the first copy only a part has come."""
    number = service.submit()
    service.ask()
    service.edit("up", lambda bodies: bodies[:-1])
    service.queries._set(number, sent=False)
    service.settle()
    service.expect_scores()


def test_keys_that_the_server_has_lost_are_sent_again(service: Service) -> None:
    service.submit()
    service.settle()
    for path in (service.keys / "north").glob("*"):
        path.unlink()
    service.submit()
    service.settle()
    service.expect_scores()


def test_a_server_with_another_secret_lets_queries_begin_again(service: Service) -> None:
    """It could compute, and what came of it would mean nothing."""
    service.submit()
    service.ask()
    service.answer()
    service.ask()
    other = service.answer(secret=b"t" * 32)
    recurrent = service.classifier.state is not None
    assert (other.answered, other.refused) == ((0, 1) if recurrent else (0, 0))
    for _ in range(FRAMES):
        service.ask()
        service.answer(secret=b"t" * 32)
    assert service.ask()
    service.expect_scores()
    assert service.broker.depth(service.names.dead) == int(recurrent)


def test_answers_to_the_same_query_are_blinded_with_other_numbers(service: Service) -> None:
    """A site that asks twice with other frames could otherwise subtract, and see how the state changed."""
    service.submit()
    service.ask()
    service.edit("up", lambda bodies: [*bodies, *bodies[-2:]])
    service.answer()
    states: list[FloatArray] = []
    query = service.queries.get(1)

    def kept(bodies: list[bytes]) -> list[bytes]:
        parcels = Parcels()
        for body in bodies:
            pieces = parcels.add(wire.decode(body, CONTRACT[Kind.ANSWER], LIMIT))
            if pieces is not None and service.classifier.state is not None:
                states.append(service.half.decrypt_state(query, pieces))
        return bodies

    service.edit("down", kept)
    if service.classifier.state is not None:
        first, second = states
        assert np.abs(first - second).min() > 1e-3, "no number is the same"
        assert np.abs(first - second).mean() > 1e5
    service.settle()
    service.expect_scores()


def altered(body: bytes) -> bytes:
    """With another bit in its last tensor byte."""
    changed = bytearray(body)
    changed[-1000] ^= 4
    return bytes(changed)


def test_an_altered_query_is_refused_before_it_is_evaluated(service: Service) -> None:
    service.submit()
    service.ask()
    service.edit("up", lambda bodies: [*bodies[:-2], altered(bodies[-2]), bodies[-1]])
    server = service.answer()
    assert (server.answered, server.refused) == (0, 1)
    assert service.ask(), "there is nothing more to wait for"
    query = service.queries.get(1)
    assert query.logits is None
    assert "was altered on its way" in str(query.refusal)
    assert service.broker.depth(service.names.dead) == 1
    service.submit()
    service.settle()
    assert service.queries.get(2).logits is not None


def test_chunks_of_a_query_that_was_refused_are_let_go(service: Service) -> None:
    """One of them makes no sense; those that come behind it would be waited for in vain."""
    service.submit()
    service.ask()
    service.edit("up", lambda bodies: [*bodies[:-2], misplaced(bodies[-2]), bodies[-1]])
    service.answer()
    assert service.broker.depth(service.names.up) == 0
    assert service.ask()
    assert service.queries.get(1).refusal is not None


def misplaced(body: bytes) -> bytes:
    """A chunk that says it is another one, of which there are not so many."""
    message = wire.decode(body, CONTRACT[Kind.QUERY], LIMIT)
    changed = Message(message.header, message.tensors, {**message.scalars, "chunk": 60})
    return b"".join(bytes(piece) for piece in wire.encode(changed, CONTRACT[Kind.QUERY], LIMIT))


def test_an_altered_answer_is_refused(service: Service) -> None:
    service.submit()
    service.ask()
    service.answer()
    service.edit("down", lambda bodies: [*bodies[:-1], altered(bodies[-1])])
    assert service.ask()
    query = service.queries.get(1)
    assert "was altered on its way" in str(query.refusal)
    assert service.broker.depth(service.names.dead) == 1


def test_garbage_is_put_aside_and_the_next_query_answered(service: Service) -> None:
    with service.broker.link([], 1, "north") as link:
        link.publish(service.names.up, "x", [b"no message"])
        other = Message(Header("other", "north", SERVER, Kind.QUERY, 1), {}, {})
        wrong = Message(Header("film", "north", SERVER, Kind.REPORT, 1), {}, {})
        for name, message in (("y", other), ("z", wrong)):
            link.publish(service.names.up, name, wire.encode(message, Payload(Kind.NOTED), LIMIT))
        while link.unconfirmed:
            link.receive(0.1)
    service.submit()
    service.settle()
    service.expect_scores()
    assert service.broker.depth(service.names.dead) == 3


def test_what_fits_no_step_is_refused(service: Service) -> None:
    half, number = HeClstmServer(service.classifier, b"s" * 32), service.submit()
    pieces = service.half.encrypt_step(service.queries.get(number))
    name = service.queries.get(number).packing
    for step, packing, sent in ((0, "spiral", pieces), (half.steps, name, pieces), (-1, name, pieces), (0, name, [])):
        with pytest.raises(Refused, match="304"):
            half.answer(service.public, step, packing, sent, "", "n")
    assert len(half.answer(service.public, 0, name, pieces, "", "n")) == (3 if half.steps > 1 else 1)


def test_a_query_stays_when_the_process_that_evaluates_it_dies(service: Service) -> None:
    def evaluate(*given: object) -> Future[list[bytes]]:
        evaluation: Future[list[bytes]] = Future()
        evaluation.set_exception(StateError(509, "it died.", "start again."))
        return evaluation

    service.submit()
    service.ask()
    with pytest.raises(StateError) as caught:
        service.answer(evaluate)
    assert caught.value.number == 509
    service.settle()
    service.expect_scores()


# -- parcels ---------------------------------------------------------------------------------------

HEADER = Header("film", "north", SERVER, Kind.ANSWER, 1)


def messages(pieces: list[bytes], limit: int = HEADER_BYTES + 10) -> list[Message]:
    return list(chunks(HEADER, pieces, limit))


@pytest.mark.parametrize("pieces", [[b"abc"], [b""], [b"a" * 35, b"", b"bc"], [bytes(range(200))]])
def test_a_parcel_comes_out_as_it_went_in(pieces: list[bytes]) -> None:
    for order in (1, -1):
        parcels, found = Parcels(), None
        for message in messages(pieces)[::order]:
            assert found is None
            found = parcels.add(message)
        assert found == pieces


def test_chunks_of_other_lengths_replace_those_that_were_there() -> None:
    """The sender was started again with another size of messages."""
    parcels, pieces = Parcels(), [b"abc" * 10]
    assert parcels.add(messages(pieces)[2]) is None
    assert [parcels.add(message) for message in messages(pieces, HEADER_BYTES + 15)] == [None, pieces]


def test_a_parcel_that_is_sent_anew_replaces_the_first_part_of_the_old_one() -> None:
    parcels = Parcels()
    old, new = messages([b"a" * 35]), messages([b"b" * 35])
    assert parcels.add(old[0]) is None
    assert [parcels.add(message) for message in new] == [None, None, None, [b"b" * 35]]


@pytest.mark.parametrize("place", [{"chunk": -1}, {"chunk": 4}, {"chunks": 0}, {"chunks": 65}, {"sha256": "no"}])
def test_an_impossible_chunk_is_refused(place: dict[str, int | str]) -> None:
    parcels, (first, *_) = Parcels(), messages([b"abc"])
    with pytest.raises(Refused) as caught:
        parcels.add(Message(first.header, first.tensors, {**first.scalars, **place}))
    assert caught.value.number == 304
