"""What decodes may still be nonsense: every kind to either side, every fact at its extremes, through the engine.

No worker may die of a message: it is applied, refused by number, or ends the run by a numbered error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.protocols import make_server
from nightsplit.server_worker.role import ServerRole
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.engine.mailbox import Mailbox
from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.protocols.build import build_model
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, systems
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.transport import Route
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, UNSEQUENCED, Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload, ScalarSpec
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.simulation.store import MemoryStore
from nightsplit.site_worker.protocols import make_site
from nightsplit.site_worker.role import SiteRole
from tests.harness.night import Authority, Night, tiny_config, tiny_splits

LIMIT = 2**20
EXTREMES: dict[type, tuple[Scalar, ...]] = {
    bool: (False,),
    int: (-(2**63), -1, 0, 7, 10**6, 2**63 - 1),
    float: (-1e308, 1e308),
    str: ("", "{}", '{"a": 1}', "[" * 50_000, '{"test": {"auc": 1e999}}', "\0" * 1000, "9" * 5000),
}


def config_of(protocol: str):
    averaged = {"bottoms": "averaged", "average_every": 1} if PROTOCOLS[protocol].trains_bottom else {}
    return tiny_config(("north",), protocol=protocol, window=1, epochs=1, **averaged)


def bodies(kind: Kind, payload: Payload, header: Header, plain: dict[str, Scalar]) -> Iterator[bytes]:
    """The message as it should be, and with each fact and tensor at each extreme."""
    # Whoever sends this keeps to no limits.
    payload = replace(payload, scalars={name: ScalarSpec(s.type, s.reveals) for name, s in payload.scalars.items()})
    scalars = {name: plain.get(name, EXTREMES[spec.type][0]) for name, spec in payload.scalars.items()}
    shapes = {n: [8 if isinstance(length, str) else length for length in s.shape] for n, s in payload.tensors.items()}
    tensors = {n: torch.ones(shapes[n], dtype=spec.dtype) for n, spec in payload.tensors.items()}
    changed = [(scalars, tensors)]
    changed += [({**scalars, n: v}, tensors) for n, s in payload.scalars.items() for v in EXTREMES[s.type]]
    changed += [(scalars, {**tensors, n: tensors[n] * v}) for n in tensors for v in (0.0, -3e38, 3e38)]
    for facts, values in changed:
        yield b"".join(wire.encode(Message(header, values, facts), payload, LIMIT))


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("to_server", [True, False], ids=["to the server", "to the site"])
@pytest.mark.parametrize("protocol", systems(*TRAINING))
def test_no_worker_dies_of_a_message(protocol: str, to_server: bool, kind: Kind, tmp_path: Path) -> None:
    config = config_of(protocol)
    payload = build_model(config, tmp_path).contract.get(kind, Payload(kind))
    sender, receiver = ("north", SERVER) if to_server else (SERVER, "north")
    header = Header(config.run.id, sender, receiver, kind, 0 if kind in UNSEQUENCED else 2 if to_server else 1)
    plain: dict[str, Scalar] = {
        "contract": config.digest, "config": config.canonical(), "incarnation": "north-2", "enrolled": True,
        "train": 40, "validation": 10, "test": 10, "mark": 0, "released": 0, "number": 601,
    }  # fmt: skip
    night = Night(config, tmp_path)
    night.work(SERVER, 0.0)
    night.work("north", 0.0)
    if to_server:
        night.work(SERVER, 0.0)  # it knows north's plan, and has answered its first message
    snapshot = night.roles[receiver].snapshot(None)
    for body in bodies(kind, payload, header, plain):
        if to_server:
            made: SiteRole | ServerRole = make_server(config, tmp_path / SERVER, tmp_path)
        else:
            made = make_site("north", config, tiny_splits("north"), "north-2", tmp_path, ledger=tmp_path / "ledger.db")
        made.restore(snapshot)
        began = time.thread_time()
        try:
            receive(made, config, body, tmp_path)
        except (RunError, Refused) as error:  # Refused: of what the site itself would send, so it stops
            if to_server:
                raise AssertionError(f"the server stops: {error}") from error
        assert time.thread_time() - began < 2.0


def receive(role: SiteRole | ServerRole, config: RunConfig, body: bytes, folder: Path) -> None:
    """A fresh engine takes one message, and its role does what it then has to do."""
    broker, queues = MemoryBroker(), site_queues(config.run.id, "north", 2**20)
    broker.declare(queues)
    up, down = (queues.up, queues.down) if role.name == "north" else (queues.down, queues.up)
    with broker.link([], 8, "attacker") as attacker, broker.link([down], 8, role.name) as link:
        attacker.publish(down, "poison", [body])
        peer = SERVER if role.name == "north" else "north"
        routes = {peer: Route(up, down, queues.dead)}
        mailbox = Mailbox(config.run.id, role.name, link, routes, role.payload, config.wire.message_bytes)
        engine = Engine(role, mailbox, Checkpoints(folder), Authority(MemoryStore(), 1))
        if isinstance(role, ServerRole):
            engine.marks["north"] = role.applied["north"]
        else:
            engine.marks[SERVER] = role.answered
        for _ in range(10):
            engine.step(0.0)
