"""Thousands of hostile messages for each system: every kind at every place, from both sides, well-formed and extreme.

They take the place of genuine ones, so runs go on in states that no honest partner would bring about. Whatever comes is
applied or refused with a number; a site may end with one, since who speaks as the server can end a run; the server
never ends. A role that is restored from its snapshot goes on, so that no worker can start again and again.
"""

import dataclasses
import json
import random
from collections import Counter

import pytest
import torch

from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.protocols.spec import TRAINING, Shape, spec_of, systems
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import FROM_SITES, SERVER, UNSEQUENCED, Kind, Message
from tests.harness.dialogue import FLOATS, INTEGERS, LIMIT, Dialogue, filled, sendable
from tests.harness.night import tiny_config, tiny_rounds

RUNS = [
    pytest.param("split_labels", 1_000),
    *(pytest.param(system, 10_000, marks=pytest.mark.campaign) for system in systems(*TRAINING)),
]
"""Systems, and the number of forged messages that each is told; ten thousand take half a minute."""
SITES = ("north", "east")
SCALARS = {
    bool: (False, True),
    int: (-(2**63), -1, 0, 1, 2, 3, 7, 10**6, 2**63 - 1),
    float: (-1e308, -1.0, 0.0, 1.0, 1e308),
    str: (
        "", "{}", "[]", "null", "[" * 20_000, "9" * 5000, "\0" * 1000, "<img src=x onerror=alert(1)>",
        '{"test": {"samples": 5.0, "loss": 1.0}}', '{"test": {"samples": 1e999}}', '{"test": {"auc": NaN}}',
        json.dumps({"test": {"samples": 1e300, "loss": 0.0, "mae": 0.0, "r2": 1.0}}), json.dumps(["{}"] * 10),
    ),
}  # fmt: skip


def config_of(system: str):
    if spec_of(base := tiny_config(SITES, protocol=system)).shape is Shape.ROUND:
        return tiny_rounds(SITES, protocol=system, **({} if system == "data_vectors" else {"rounds": 3}))
    averaged = {"bottoms": "averaged", "average_every": 3} if spec_of(base).trains_bottom else {}
    return tiny_config(SITES, protocol=system, window=2, epochs=2, batch_size=12, patience=1, **averaged)


class Liar:
    """Replaces messages; every choice is the dice's."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.sent = {True: 0, False: 0}
        """Forged messages, to the server and to sites."""
        self.refused = 0
        self.numbers: Counter[int] = Counter()
        """Of refusals."""
        self.ended: Counter[int] = Counter()
        """Numbers with which a worker ended."""
        self.server_ended = False

    def forgery(self, genuine: Message, role) -> Message:
        dice, to_server = self.dice, genuine.header.receiver == SERVER
        kinds = [kind for kind in Kind if (kind in FROM_SITES) is to_server and role.payload(kind) is not None]
        kind = genuine.header.kind if dice.random() < 0.5 else dice.choice(kinds)
        payload = role.payload(kind)
        header = dataclasses.replace(genuine.header, kind=kind, seq=0 if kind in UNSEQUENCED else genuine.header.seq)
        for field in ("version", "reply_to"):
            if dice.random() < 0.15:
                header = dataclasses.replace(header, **{field: dice.choice((0, 1, 5, 2**63 - 1))})
        same = kind is genuine.header.kind
        scalars = {
            name: genuine.scalars[name] if same and dice.random() < 0.7 else dice.choice(SCALARS[spec.type])
            for name, spec in payload.scalars.items()
        }
        rows = max([1, *(len(tensor) for tensor in genuine.tensors.values() if tensor.ndim)])
        rows = rows if dice.random() < 0.9 else dice.choice((1, rows + 1))
        tensors = {}
        for name, spec in payload.tensors.items():
            if same and dice.random() < 0.5:
                tensors[name] = genuine.tensors[name]
            else:
                value = dice.choice(FLOATS if spec.dtype.is_floating_point else INTEGERS)
                tensors[name] = filled(spec, rows, value)
        return Message(header, tensors, scalars)

    def tell(self, role, message: Message) -> bool:
        """Give a role a forgery as its engine would; whatever it then says can be said. Whether it goes on from there.

        A role that refuses is as it was, so it can be told the next one; some refusals count as applied.
        """
        self.sent[role.name == SERVER] += 1
        payload = role.payload(message.header.kind)
        try:
            body = b"".join(wire.encode(message, payload, LIMIT))
            effects = role.on(wire.decode(body, payload, LIMIT))
        except Refused as refusal:
            self.refused += 1
            self.numbers[refusal.number] += 1
            if message.header.kind in UNSEQUENCED or self.dice.random() < 0.7:
                return False
            effects = role.refused(message.header, refusal)
        sendable(role, [*effects, *role.next()])
        return True


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("system", "messages"), RUNS)
def test_whatever_is_said_wherever_no_worker_dies_of_it(system, messages):
    liar = Liar(random.Random(f"hostile/{system}"))
    runs = 0
    while min(liar.sent.values()) < messages // 2:
        runs += 1
        one_run(liar, config_of(system))
    assert liar.refused > messages // 10
    assert all(300 < number < 400 for number in liar.numbers)
    assert all(400 < number < 700 for number in liar.ended)
    assert not liar.server_ended, "one message ends the run for all"
    assert runs > messages // 2000


def one_run(liar: Liar, config) -> None:
    talk = Dialogue(config, liar.dice)
    try:
        for name, genuine in talk.walk():
            hears_lies(talk.clone(name), liar, genuine)
            # A forged end is believed where the run may end early: then the server waits for a site that has left.
            forged = liar.forgery(genuine, talk.roles[name])
            if liar.dice.random() < 0.2 and forged.header.kind not in {*UNSEQUENCED, Kind.FINISH}:
                liar.sent[name == SERVER] += 1
                talk.swap(genuine, travelled(forged, talk.roles[name]))
    except RunError as end:
        liar.ended[end.number] += 1


def hears_lies(role, liar: Liar, genuine: Message) -> None:
    """A role in the state of the run's, as after a restart, refuses forgeries, or takes one and works on."""
    for _ in range(liar.dice.randint(0, 8)):
        try:
            if liar.tell(role, liar.forgery(genuine, role)):
                break
        except RunError as end:
            liar.ended[end.number] += 1
            liar.server_ended |= role.name == SERVER
            return
    json.dumps(role.snapshot(None).facts)  # as a checkpoint writes it


def travelled(message: Message, role) -> Message:
    """As it is decoded; one that cannot be encoded is refused by the receiver all the same, as an empty one is."""
    payload = role.payload(message.header.kind)
    try:
        return wire.decode(b"".join(wire.encode(message, payload, LIMIT)), payload, LIMIT)
    except Refused:
        return Message(message.header, {name: torch.zeros(0) for name in payload.tensors}, message.scalars)
