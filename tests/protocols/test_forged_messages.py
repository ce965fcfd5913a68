"""What decodes may still be nonsense: every kind to either side, every fact at its extremes, through the engine.

No worker may die of a message: it is applied, refused by number, or ends the run by a numbered error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import copytree

import pytest
import torch

from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.protocols.build import build_model
from nightsplit.shared.protocols.spec import PROTOCOLS, TRAINING, systems
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, UNSEQUENCED, Header, Kind, Message, Scalar
from nightsplit.shared.wire.schema import Payload, ScalarSpec
from tests.harness.night import Night, tiny_config

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


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Night]:
    """Runs that have begun, once for each system and the side that is going to be attacked."""

    @cache
    def begun(protocol: str, receiver: str) -> Night:
        night = Night(config_of(protocol), tmp_path_factory.mktemp("begun"))
        night.work(SERVER, 0.0)
        night.work("north", 0.0)
        if receiver == SERVER:
            night.work(SERVER, 0.0)  # it knows north's plan, and has answered its first messages
        return night

    return begun


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("to_server", [True, False], ids=["to the server", "to the site"])
@pytest.mark.parametrize("protocol", systems(*TRAINING))
def test_no_worker_dies_of_a_message(
    protocol: str, to_server: bool, kind: Kind, begun: Callable[[str, str], Night], tmp_path: Path
) -> None:
    config = config_of(protocol)
    payload = build_model(config, tmp_path).contract.get(kind, Payload(kind))
    sender, receiver = ("north", SERVER) if to_server else (SERVER, "north")
    night = begun(protocol, receiver)
    due = night.server.applied["north"] + 1 if to_server else 1
    header = Header(config.run.id, sender, receiver, kind, 0 if kind in UNSEQUENCED else due)
    plain: dict[str, Scalar] = {
        "contract": config.digest, "config": config.canonical(), "incarnation": "north-2", "enrolled": True,
        "train": 40, "validation": 10, "test": 10, "mark": 0, "released": 0, "number": 601,
    }  # fmt: skip
    for body in bodies(kind, payload, header, plain):
        attacked = returned(night, receiver, tmp_path)
        inbox = night.queues["north"].up if to_server else night.queues["north"].down
        with attacked.broker.link([], 8, "attacker") as attacker:
            attacker.publish(inbox, "poison", [body])
        began = time.thread_time()
        try:
            attacked.turn(receiver, 10)
        except (RunError, Refused) as error:  # Refused: of what the site itself would send, so it stops
            if to_server:
                raise AssertionError(f"the server stops: {error}") from error
        assert time.thread_time() - began < 2.0


def returned(night: Night, worker: str, folder: Path) -> Night:
    """A worker that comes back from its checkpoint to empty queues; the run that it comes from stays as it is."""
    again = Night(night.config, copytree(night.folder, folder, dirs_exist_ok=True))
    again.checkpoints[worker] = deepcopy(night.checkpoints[worker])
    pointer = night.store.pointer() if worker == SERVER else None
    if pointer is not None:
        again.store.move_pointer(pointer)
    mark = again.start(worker).marks["north" if worker == SERVER else SERVER]
    assert mark == (night.server.applied["north"] if worker == SERVER else 0)
    return again
