"""One hostile message of one of three sites: refused by number, the run ends, and the others learn as without it.

Rows A1 to A4 and A6 of the attacks, each of which ended the server at every start. "Without it" is a run in which the
same message is refused for another reason. Reports of other contents, A5, A7 and A9, are in test_hostile_reports.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace as changed

from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.engine.effects import Send
from nightsplit.shared.wire.message import SERVER, Kind
from tests.harness.night import Night, tiny_config, tiny_rounds

SITES = ("north", "south", "east")
BINARY = tiny_config(SITES, epochs=2, window=2)
MULTICLASS = changed(BINARY, task=TaskSection(kind="multiclass", classes=3), model=changed(
    BINARY.model, factory="tests.protocols.test_attacks:three_classes", settings={}, cut=2,
))  # fmt: skip
SPLIT_U = tiny_config(SITES, protocol="split_u", epochs=2)
ROUNDS = tiny_rounds(SITES, rounds=2)

Change = Mapping[str, object]
ATTACKS = {
    **{f"A1 label {label}": (MULTICLASS, 1, {"targets": label}) for label in (3, -101)},
    **{f"A2 target {target}": (BINARY, 1, {"targets": target}) for target in (0.5, 1e30)},
    "A2 target of a held-out patient": (BINARY, "held out", {"targets": 0.5}),
    **{
        f"{row}, {name}": (config, "report", {"metrics": text})
        for name, config in (("split_u", SPLIT_U), ("rounds", ROUNDS))
        for row, text in {
            "A3 no samples": '{"test": {"auc": 0.5}, "validation": {"auc": 0.5}}',
            "A4 nested lists": '{"test":{"x":' + "[" * 1900,
            "A6 infinite samples": '{"test": {"samples": 1e999}}',
        }.items()
    },
}


def three_classes() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def is_meant(send: Send, place: object, held_out: int) -> bool:
    """Whether an attack replaces a message: the one of a number, the first of a held-out batch, or the first report."""
    if place == "report":
        return str(send.scalars.get("metrics", "{}")) != "{}"
    return send.kind is Kind.SMASHED and send.seq == (held_out if place == "held out" else place)


def poisoned(send: Send, change: Change) -> Send:
    """The message with other values or, for "rows", of other patients than the plan's."""
    rows = change.get("rows")
    tensors = {
        name: torch.full_like(tensor, change[name]) if name in change else tensor[:rows]
        for name, tensor in send.tensors.items()
    }
    return replace(send, tensors=tensors, scalars={n: change.get(n, value) for n, value in send.scalars.items()})


def run(night: Night, place: object, change: Change) -> Night:
    """Play to the end, with one message of south changed; the server is thrown away again and again."""
    if night.config.task.kind == "multiclass":
        for splits in night.splits.values():
            for part in (splits.train, splits.validation, splits.test):
                object.__setattr__(part, "targets", part.targets.long())
    done: list[int] = []
    for name in night.workers:
        night.start(name)
    engine = night.engines["south"]
    honest = engine._outgoing._send

    def send(effect: Send) -> None:
        plan = getattr(night.roles["south"].sequence, "plan", None)
        held_out = plan.end(1) - 1 if plan else 0
        if not done and is_meant(effect, place, held_out):
            done.append(effect.seq)
            effect = poisoned(effect, change)
        honest(effect)

    engine._outgoing._send = send
    for turn in range(5000):
        if not night.engines:
            break
        for name in list(night.engines):
            night.step(name)
        if SERVER in night.engines and turn % 20 == 19:
            night.restart(SERVER)
    assert done, "the attack was made"
    assert not night.engines, "the run ends"
    return night


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_refused_and_the_others_learn_as_without_it(attack: str, tmp_path: Path) -> None:
    config, place, change = ATTACKS[attack]
    attacked = run(Night(config, tmp_path / "attacked"), place, change)
    assert attacked.server.refusals == {"south": 1}
    other = {"metrics": "[]"} if "metrics" in change else {"rows": 1}
    without = run(Night(config, tmp_path / "without"), place, other)
    assert without.server.refusals == {"south": 1}
    assert attacked.fingerprint("south") == without.fingerprint("south")
