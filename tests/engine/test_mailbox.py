"""The pipeline of messages by itself: what comes in is read once, what goes out passes the gate."""

from dataclasses import replace

import pytest
import torch

from nightsplit.broker.topology import site_queues
from nightsplit.shared.engine.mailbox import DeadLetter, Mailbox, Received
from nightsplit.shared.errors import ConfigError, Refused
from nightsplit.shared.transport import Delivery, Route
from nightsplit.shared.wire import head
from nightsplit.shared.wire.format import encode
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload, Reveals, TensorSpec, contract
from nightsplit.simulation.broker import MemoryBroker

QUEUES = site_queues("run", "north", 100_000)
ROUTE = Route(outgoing=QUEUES.up, incoming=QUEUES.down, dead=QUEUES.dead)
ACTIVATIONS = TensorSpec(torch.float32, ("batch", 2), reveals=Reveals.ACTIVATIONS)
SCHEMA = contract(
    Payload(Kind.SMASHED, {"smashed": ACTIVATIONS}),
    Payload(Kind.CUT_GRADIENT, {"gradient": TensorSpec(torch.float32, ("batch", 2))}),
)
SMASHED = Message(Header("run", "north", SERVER, Kind.SMASHED, 1), {"smashed": torch.ones(3, 2)})
GRADIENT = Message(Header("run", SERVER, "north", Kind.CUT_GRADIENT, 1), {"gradient": torch.ones(3, 2)})


class Strict:
    """A gate that lets messages of at least `rows` samples out, and nothing in unless told to."""

    def __init__(self, rows=1, obeys=True):
        self.rows, self.obeys, self.asked = rows, obeys, []

    def check_out(self, header, payload, samples):
        self.asked.append(header.kind)
        if samples < self.rows:
            raise ConfigError(108, "too few patients.", "none.")

    def check_in(self, header, payload):
        if not self.obeys:
            raise ConfigError(108, "not obeyed.", "none.")


@pytest.fixture
def broker():
    memory = MemoryBroker()
    memory.declare(QUEUES)
    return memory


def site(broker, gate=None):
    link = broker.link([QUEUES.down], 8, "north")
    return Mailbox("run", "north", link, {SERVER: ROUTE}, SCHEMA.get, 2**20, gate)


def delivery(message=GRADIENT, body=None, **more):
    body = body or b"".join(encode(message, SCHEMA[message.header.kind], 2**20))
    return Delivery(QUEUES.down.name, message.header.message_id, body, **more)


def test_a_message_is_opened_and_its_header_read_once(broker, monkeypatch):
    parsed = []
    parse = head._parse
    monkeypatch.setattr(head, "_parse", lambda *args: parsed.append(1) or parse(*args))
    mailbox = site(broker)
    received = mailbox.receive(delivery())
    assert isinstance(received, Received)
    assert torch.equal(mailbox.open(received).tensors["gradient"], torch.ones(3, 2))
    assert len(parsed) == 1


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (310, {"run": "another"}), (310, {"sender": "south"}), (310, {"receiver": "south"}),
        (301, {"sender": ""}),
    ],
)  # fmt: skip
def test_what_is_from_nobody_is_put_aside_at_once(broker, number, change):
    mailbox = site(broker)
    good = b"".join(encode(GRADIENT, SCHEMA[Kind.CUT_GRADIENT], 2**20))
    if number == 301:
        body = b"\0" + good
    else:
        body = b"".join(
            encode(Message(replace(GRADIENT.header, **change), GRADIENT.tensors), SCHEMA[Kind.CUT_GRADIENT], 2**20)
        )
    put = mailbox.receive(delivery(body=body))
    assert isinstance(put, DeadLetter)
    (letter,) = broker.peek(QUEUES.dead)
    assert (letter.headers["number"], letter.message_id, letter.body) == (str(number), put.copy, body)
    assert mailbox.counters.counts["refused"] == 1


def test_another_user_of_the_broker_is_nobody(broker):
    assert isinstance(site(broker).receive(delivery(user="south")), DeadLetter)
    assert isinstance(site(broker).receive(delivery(user=SERVER)), Received)


@pytest.mark.parametrize("kind", [Kind.SMASHED, Kind.AVERAGE])
def test_a_kind_that_has_no_place_here_is_refused_in_its_turn(broker, kind):
    """It keeps its number in the sequence, so a later message does not wait for it."""
    forged = Message(Header("run", SERVER, "north", kind, 7))
    body = b"".join(encode(forged, Payload(Kind.NOTED), 2**20))
    received = site(broker).receive(delivery(forged, body))
    assert isinstance(received, Received)
    assert received.header.seq == 7
    with pytest.raises(Refused) as caught:
        site(broker).open(received)
    assert caught.value.number == 303


def test_every_message_that_leaves_passes_the_gate(broker):
    gate = Strict(rows=3)
    mailbox = site(broker, gate)
    assert mailbox.send(SMASHED) == SMASHED.header.message_id
    with pytest.raises(ConfigError):
        mailbox.send(Message(SMASHED.header, {"smashed": torch.ones(2, 2)}))
    assert gate.asked == [Kind.SMASHED] * 2
    assert broker.depth(QUEUES.up) == 1
    assert mailbox.counters.counts["sent"] == 1


def test_a_dead_letter_passes_the_gate_again_when_it_leaves_again(broker):
    """The hospital may have changed its mind since; what came from the server is only put back."""
    letter = Delivery(QUEUES.dead.name, "dead", b"".join(encode(SMASHED, SCHEMA[Kind.SMASHED], 2**20)))
    anything = Delivery(QUEUES.dead.name, "dead", b"anything")
    site(broker, Strict(rows=3)).send_again(QUEUES.up, "again", letter)
    with pytest.raises(ConfigError):
        site(broker, Strict(rows=4)).send_again(QUEUES.up, "again", letter)
    with pytest.raises(Refused):
        site(broker, Strict()).send_again(QUEUES.up, "again", anything)
    site(broker, Strict(rows=4)).send_again(QUEUES.down, "again", anything)
    assert (broker.depth(QUEUES.up), broker.depth(QUEUES.down)) == (1, 1)


def test_what_the_hospital_does_not_obey_stays_at_the_broker(broker):
    mailbox = site(broker, Strict(obeys=False))
    received = mailbox.receive(delivery())
    assert isinstance(received, Received)
    with pytest.raises(ConfigError):
        mailbox.open(received)
    assert broker.depth(QUEUES.dead) == 0
