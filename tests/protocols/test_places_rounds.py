"""Every kind of message at every place of a round, with extremes: applied, or refused with nothing changed.

Roles alone play whole runs here; messages go from hand to hand, without an engine, a broker or a disk.
"""

import dataclasses
import itertools
import json
from collections import deque
from collections.abc import Iterator

import pytest
import torch

from nightsplit.shared.engine.effects import Finish, Record, Send
from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, UNSEQUENCED, Header, Kind, Message
from tests.harness.night import tiny_rounds
from tests.harness.pure_roles import pure_server, pure_site

NAMES = ("north", "south")
RUNS = {
    "fedavg_transfer": {},
    "buffered": {"order": "fair", "close": "buffered", "reports": 2},
    "fedavg_dp_seg": {"protocol": "fedavg_dp_seg"},
    "data_vectors": {"protocol": "data_vectors"},
}
TEXTS = (
    "", "{}", "[]", "null", "\0" * 1000, "[" * 50_000, '{"test":' * 200, "9" * 5000, "<b>|\n#",
    '{"test": {}}', '{"test": {"samples": 1e999}}', '{"test": {"samples": 5.0, "step": 1e300}}',
    json.dumps({"test": {"samples": 5.0, "loss": 1.0, "auc": 2.0, "balanced_accuracy": None}}),
    json.dumps({"test": {"samples": 5e8, "loss": 1.0, "auc": None, "balanced_accuracy": None}}),
    json.dumps({"test": {"samples": 1.5, "loss": 1.0, "auc": None, "balanced_accuracy": None}}),
    json.dumps(["{}"] * 9), json.dumps(["{}"] * 9 + ["[" * 3000]),
)  # fmt: skip
EXTREMES = {
    bool: (False, True),
    int: (-(2**63), -1, 0, 1, 3, 7, 11, 10**9, 2**63 - 1),
    str: TEXTS,
}
FACTORS = (0.0, 1e19, -1e25, 3e38)
PLACES = (0, 1, 2, 10**6, 2**63 - 1)
"""For seq, version and reply_to."""


class Hands:
    """A run in which every message is shown to `look` before it is applied."""

    def __init__(self, config, look):
        self.config, self.look = config, look
        self.roles = {name: self.made(name) for name in (SERVER, *NAMES)}
        self.waiting = {name: {peer: deque() for peer in self.roles} for name in self.roles}
        self.finished = set()

    def made(self, name):
        return pure_server(self.config) if name == SERVER else pure_site(self.config, name)

    def play(self):
        for name, role in self.roles.items():
            self.act(name, role.start())
        for _ in range(5000):
            if len(self.finished) == len(self.roles):
                return
            for name in self.roles.keys() - self.finished:
                self.turn(name)
        raise AssertionError("the run hangs")

    def turn(self, name):
        role, waiting = self.roles[name], self.waiting[name]
        for queue in waiting.values():
            while queue and queue[0].header.seq == 0:
                self.apply(name, queue.popleft())
        sender = role.choose({peer for peer, queue in waiting.items() if queue})
        if sender is None:
            self.act(name, role.next())
        else:
            self.apply(name, waiting[sender].popleft())

    def apply(self, name, message):
        self.look(self, name, message)
        self.act(name, self.roles[name].on(message))

    def act(self, name, effects):
        for effect in effects:
            if isinstance(effect, Finish):
                self.finished.add(name)
                self.act(name, effect.farewell)
            elif isinstance(effect, Send):
                self.waiting[effect.receiver][name].append(self.sent(name, effect))

    def sent(self, name, send):
        """As it arrives: it could be encoded, and was read again."""
        payload = self.roles[name].payload(send.kind)
        header = Header(
            self.config.run.id,
            name,
            send.receiver,
            send.kind,
            send.seq,
            send.reply_to,
            send.version,
            int(name == SERVER),
        )
        limit = self.config.wire.message_bytes
        body = b"".join(wire.encode(Message(header, send.tensors, send.scalars), payload, limit))
        return wire.decode(body, payload, limit)


def state_of(role):
    """As a checkpoint holds it."""
    snapshot = role.snapshot(None)
    return Snapshot(dict(snapshot.tensors), json.loads(json.dumps(snapshot.facts)))


def is_equal(one, other):
    return (
        one.facts == other.facts
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    )


def filled(kind, payload, message):
    """A message of another kind at the place of `message`, as its contract wants it."""
    scalars = {name: EXTREMES[bool][-1] if of.type is bool else of.type() for name, of in payload.scalars.items()}
    length = len(message.tensors["values"]) if "values" in message.tensors else 8
    shapes = {n: [length if isinstance(one, str) else one for one in spec.shape] for n, spec in payload.tensors.items()}
    tensors = {name: torch.zeros(shapes[name], dtype=spec.dtype) for name, spec in payload.tensors.items()}
    return Message(dataclasses.replace(message.header, kind=kind), tensors, {**scalars, "metrics": "{}"})


def out_of_place(role, message) -> Iterator[Message]:
    """What the plan has nowhere here: other kinds, other places, other shapes, values that cannot be summed up."""
    header, tensors, scalars = message.header, message.tensors, message.scalars
    for kind in Kind:
        payload = role.payload(kind)
        if kind not in UNSEQUENCED and kind is not header.kind:
            empty = Message(dataclasses.replace(header, kind=kind))
            yield filled(kind, payload, message) if payload is not None else empty
    for field, value in itertools.product(("seq", "version", "reply_to"), PLACES):
        if value != getattr(header, field) and not (field == "version" and role.config.round.close == "buffered"):
            yield Message(dataclasses.replace(header, **{field: value}), tensors, scalars)
    for name, tensor in tensors.items():
        if name == "values":
            yield Message(header, {name: tensor[:-1]}, scalars)
            yield Message(header, {name: torch.cat([tensor, tensor])}, scalars)
        else:
            yield Message(header, {name: -tensor.abs() - 1}, scalars)
        yield Message(header, {name: torch.full_like(tensor, -1e21)}, scalars)


def at_extremes(message) -> Iterator[Message]:
    """What may be refused or not: each fact at each extreme, values that are huge."""
    header, tensors, scalars = message.header, message.tensors, message.scalars
    for name, value in scalars.items():
        for extreme in EXTREMES[type(value)]:
            yield Message(header, tensors, {**scalars, name: extreme})
    for name, tensor in tensors.items():
        for factor in FACTORS:
            yield Message(header, {name: torch.ones_like(tensor) * factor}, scalars)


def outcome(act):
    """The effects, or why there are none."""
    try:
        return act(), None
    except (Refused, RunError) as error:
        return [], error


class Prober:
    """Shows a copy of the receiver what it must not take, and what it may."""

    def __init__(self):
        self.spares, self.refused, self.taken = {}, 0, 0

    def __call__(self, hands, name, message):
        before = state_of(hands.roles[name])
        spare = self.spares.setdefault(name, hands.made(name))
        if message.header.kind not in UNSEQUENCED:
            for wrong in out_of_place(spare, message):
                assert self.refuses(hands, spare, before, wrong), (wrong.header, wrong.scalars)
        for extreme in at_extremes(message):
            self.refuses(hands, spare, before, extreme)

    def refuses(self, hands, role, before, message):
        """Whether a role in this state refuses a message; what it says then, or does, can be sent and written."""
        role.restore(Snapshot(before.tensors, json.loads(json.dumps(before.facts))))
        effects, refusal = outcome(lambda: role.on(message))
        if refusal is None:
            self.taken += 1
            self.check(hands, role, effects)
            return False
        self.refused += 1
        assert is_equal(state_of(role), before), (message.header, refusal)
        assert isinstance(refusal, Refused) or role.name != SERVER, "the server ends"
        applied = role.applied[message.header.sender] if role.name == SERVER else role.answered
        if isinstance(refusal, Refused) and message.header.seq == applied + 1:  # the engine counts what is in its turn
            effects, end = outcome(lambda: role.refused(message.header, refusal))
            assert end is None or (isinstance(end, RunError) and role.name != SERVER), "the server ends"
            self.check(hands, role, effects)
        return True

    def check(self, hands, role, effects):
        for effect in effects:
            if isinstance(effect, Record):
                json.dumps(dict(effect.metrics), allow_nan=False)
                assert type(effect.metrics["step"]) is int
            for send in [effect] if isinstance(effect, Send) else effect.farewell if isinstance(effect, Finish) else []:
                hands.sent(role.name, send)
        json.dumps(state_of(role).facts, allow_nan=False)
        more, end = outcome(lambda: role.next() + role.next())
        assert end is None or (isinstance(end, RunError) and role.name != SERVER), "the server ends"
        for effect in more:
            if isinstance(effect, Send):
                hands.sent(role.name, effect)


@pytest.mark.parametrize("run", RUNS)
def test_whatever_comes_wherever_is_applied_or_refused(run):
    settings = RUNS[run]
    rounds = {} if run == "data_vectors" else {"rounds": 2}
    prober = Prober()
    Hands(tiny_rounds(NAMES, **rounds, **settings), prober).play()
    assert prober.refused > 500
    assert prober.taken > 100


def test_a_site_that_is_not_known_yet_is_refused():
    config = tiny_rounds(NAMES)
    server = Hands(config, None).roles[SERVER]
    values = torch.zeros(server.layout.slice(1).stop)
    with pytest.raises(Refused, match="out of turn"):
        server.on(
            Message(Header(config.run.id, "north", SERVER, Kind.UPDATE, 1), {"values": values}, {"metrics": "{}"})
        )
