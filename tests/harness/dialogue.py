"""Roles that talk to each other without engine, broker or disk; and forgeries of what they say.

A `Dialogue` is a run whose messages pass from role to role through the wire's encoding. At any message a test may
take a `clone` of the receiver, as a restarted process would be, and give it something else in its place.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nightsplit.server_worker.role import ServerRole
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Send
from nightsplit.shared.engine.role import Role
from nightsplit.shared.errors import Refused
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import FROM_SITES, SERVER, UNSEQUENCED, Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload, TensorSpec
from nightsplit.site_worker.role import SiteRole
from tests.harness.pure_roles import ActivationsInMemory, pure_server, pure_site

AnyRole = SiteRole | ServerRole
LIMIT = 2**20

EXTREMES: dict[type, tuple[Scalar, ...]] = {
    bool: (False, True),
    int: (-(2**63), -1, 0, 1, 10**6, 2**63 - 1),
    float: (-1e308, 0.0, 1e308),
    str: ("", "{}", '{"a": 1}', "[" * 50_000, '{"test": {"auc": 1e999}}', "\0" * 1000, "9" * 5000),
}
"""Values of a scalar that decode."""

FLOATS = (0.0, -1.0, 0.5, 1e20, -3e38, 3e38)
INTEGERS = (-(2**63), -101, -1, 0, 3, 99, 2**63 - 1)


_STATES = tempfile.TemporaryDirectory(prefix="nightsplit-states-")


class Dialogue:
    """All roles of a run, started; `walk` lets them talk until the run is over.

    Args:
        config: the run.
        dice: whose turn it is, by chance; without them all take turns, the server first.
    """

    def __init__(self, config: RunConfig, dice: random.Random | None = None) -> None:
        self.config = config
        self._activations = ActivationsInMemory()
        self._state = Path(tempfile.mkdtemp(dir=_STATES.name))
        self.roles: dict[str, AnyRole] = {name: self.make(name) for name in (SERVER, *config.run.sites)}
        self.queues: dict[tuple[str, str], deque[Message]] = {}
        """Messages in sequence that nobody has applied, by sender and receiver."""
        self.marks: Counter[tuple[str, str]] = Counter()
        """Last applied seq, likewise."""
        self.finished: set[str] = set()
        self._idle = 0
        self._dice = dice
        for name, role in self.roles.items():
            self.perform(name, role.start())

    def make(self, name: str) -> AnyRole:
        """A role as a new process makes it."""
        return (
            pure_server(self.config, self._activations, self._state) if name == SERVER else pure_site(self.config, name)
        )

    def clone(self, name: str) -> AnyRole:
        """A role in the same state, with which a test may do what it likes."""
        role = self.make(name)
        role.restore(copied(self.roles[name].snapshot(None)))
        return role

    def walk(self) -> Iterator[tuple[str, Message]]:
        """Yield each receiver and message in sequence before it is applied; `swap` puts another in its place."""
        while working := [name for name in self.roles if name not in self.finished]:
            turns = [self._dice.choice(working)] if self._dice else working
            for name in turns:
                self.perform(name, self.roles[name].next())
            found = next((found for name in turns if (found := self._next_for(name))), None)
            if found is None:
                # A role that works on its own, as split_frozen's server does, has no message to wait for.
                self._idle += 1
                assert self._idle < 10_000, "the run hangs"
                continue
            yield found
            name, header = found[0], found[1].header
            way = header.sender, name
            self.marks[way] += 1
            assert header.seq == self.marks[way], f"{header.message_id} waits for {self.marks[way]} for ever"
            self.perform(name, apply(self.roles[name], self.queues[way].popleft()))

    def swap(self, genuine: Message, forged: Message) -> None:
        """Put a forgery in the place of the message that `walk` has yielded."""
        self.queues[genuine.header.sender, genuine.header.receiver][0] = forged

    def perform(self, name: str, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Finish):
                self.finished.add(name)
                self.perform(name, list(effect.farewell))
            elif isinstance(effect, Send):
                message = encoded(self.roles[name], effect)
                if effect.kind in UNSEQUENCED:
                    self.perform(effect.receiver, self.roles[effect.receiver].on(message))
                else:
                    queue = self.queues.setdefault((name, effect.receiver), deque())
                    queue.append(message)
                    # A refusal is told at once, and may overtake answers that wait for their block's fit.
                    self.queues[name, effect.receiver] = deque(sorted(queue, key=lambda waiting: waiting.header.seq))

    def _next_for(self, name: str) -> tuple[str, Message] | None:
        """A role with the message that it applies next, if that is here."""
        here = {
            sender: queue[0] for (sender, to), queue in self.queues.items()
            if to == name and queue and queue[0].header.seq <= self.marks[sender, to] + 1
        }  # fmt: skip
        waits = name in self.finished or self.roles[name].busy
        sender = None if waits else self.roles[name].choose(here.keys())
        return None if sender is None else (name, here[sender])


def apply(role: Role, message: Message) -> list[Effect]:
    """What the engine does with a message in sequence."""
    try:
        return role.on(message)
    except Refused as refusal:
        return role.refused(message.header, refusal)


def encoded(role: Role, send: Send) -> Message:
    """A role's message as its receiver decodes it; Refused when it cannot travel."""
    payload = role.payload(send.kind)
    assert payload is not None, send.kind
    header = Header("night", role.name, send.receiver, send.kind, send.seq, send.reply_to, send.version)
    body = b"".join(wire.encode(Message(header, send.tensors, send.scalars), payload, LIMIT))
    return wire.decode(body, payload, LIMIT)


def sendable(role: Role, effects: list[Effect]) -> None:
    """What a role says after a forgery must be able to travel, its last words too."""
    for effect in effects:
        if isinstance(effect, Finish):
            sendable(role, list(effect.farewell))
        elif isinstance(effect, Send):
            encoded(role, effect)


def copied(snapshot: Snapshot) -> Snapshot:
    """A snapshot as it is read from a checkpoint."""
    tensors = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    return Snapshot(tensors, json.loads(json.dumps(snapshot.facts)))


def assert_unchanged(before: Snapshot, after: Snapshot, what: object) -> None:
    """Two snapshots are equal, tensor by tensor and fact by fact."""
    assert json.dumps(before.facts, sort_keys=True) == json.dumps(after.facts, sort_keys=True), what
    assert before.tensors.keys() == after.tensors.keys(), what
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[name]), (what, name)


def forgeries(
    genuine: Message, payload_of: Callable[[Kind], Payload | None], rows: int, plain: dict[str, Scalar] = {}
) -> Iterator[Message]:
    """All kinds that the genuine message's sender has, in its place: plain, and with each value at each extreme.

    Args:
        genuine: the message that belongs there.
        payload_of: the contract.
        rows: samples that belong there; forgeries also have one more.
        plain: values of scalars that should be believed.
    """
    sent_by_site = genuine.header.sender != SERVER
    for kind in Kind:
        payload = payload_of(kind)
        if payload is None or (kind in FROM_SITES) is not sent_by_site or kind in UNSEQUENCED:
            continue
        same = kind is genuine.header.kind
        header = genuine.header if same else replace(genuine.header, kind=kind)
        scalars = {name: plain.get(name, EXTREMES[of.type][0]) for name, of in payload.scalars.items()}
        tensors = dict(genuine.tensors) if same else {n: filled(s, rows, 1) for n, s in payload.tensors.items()}
        yield Message(header, tensors, scalars)
        for name, of in payload.scalars.items():
            yield from (Message(header, tensors, {**scalars, name: value}) for value in EXTREMES[of.type])
        for name, spec in payload.tensors.items():
            values = FLOATS if spec.dtype.is_floating_point else INTEGERS
            yield from (Message(header, {**tensors, name: filled(spec, rows, value)}, scalars) for value in values)
        if any("batch" in spec.shape for spec in payload.tensors.values()):
            yield Message(header, {n: filled(s, rows + 1, 1) for n, s in payload.tensors.items()}, scalars)
        yield from (
            Message(replace(header, **{field: value}), tensors, scalars)
            for field in ("version", "reply_to")
            for value in (0, getattr(header, field) + 1, 2**63 - 1)
        )


def filled(spec: TensorSpec, rows: int, value: float) -> torch.Tensor:
    """A tensor of one value, as long as the place wants it."""
    shape = [length if isinstance(length, int) else rows for length in spec.shape]
    return torch.full(shape, value, dtype=spec.dtype)
