"""Only what the plan has is obeyed: every kind at every place of a stream, from either side, with extremes.

A role answers with effects that can be sent, or with a numbered refusal that leaves it as it was. Roles are asked
directly: no engine, no broker.
"""

import random

import pytest
import torch

from nightsplit.server_worker.greeting import HELLO_ANSWERS_MAX
from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.engine.effects import Expect
from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.protocols.places import check_upload, kinds_at
from nightsplit.shared.protocols.plan import Plan, Purpose
from nightsplit.shared.protocols.spec import sketch
from nightsplit.shared.protocols.stream import StreamSequence
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from tests.harness.dialogue import (
    Dialogue,
    assert_unchanged,
    copied,
    forgeries,
    sendable,
)
from tests.harness.night import tiny_config

RUNS = {
    "split_labels": {"protocol": "split_labels"},
    "split_labels, averaged": {"protocol": "split_labels", "bottoms": "averaged", "average_every": 2},
    "split_u": {"protocol": "split_u"},
    "split_u, averaged": {"protocol": "split_u", "bottoms": "averaged", "average_every": 2},
    "split_frozen": {"protocol": "split_frozen"},
    "split_labels, targets": {"protocol": "split_labels", "learning": "targets"},
    "split_u, targets": {"protocol": "split_u", "learning": "targets"},
    "split_u, targets, averaged": {"protocol": "split_u", "learning": "targets", "bottoms": "averaged"},
}
ONLY = {
    Kind.CUT_GRADIENT: Purpose.TRAIN, Kind.HEAD_GRADIENT: Purpose.TRAIN,
    Kind.CUT_TARGET: Purpose.TRAIN, Kind.HEAD_TARGET: Purpose.TRAIN,  # a site must not train on held-out patients
    Kind.AVERAGE: Purpose.AVERAGE, Kind.BOTTOM: Purpose.AVERAGE,  # identity weights would give a server the patients
}  # fmt: skip
PATIENT = {"split_labels, patient": {"protocol": "split_labels", "patience": 1, "epochs": 3}}


def dialogue(run, sites=("north", "east")):
    settings = {"window": 2, "epochs": 2, "batch_size": 12, **(RUNS | PATIENT)[run]}
    return Dialogue(tiny_config(sites, **settings))


def sequence_of(talk, site):
    return talk.roles[SERVER].sequences[site]


def place_of(talk, message):
    """The site's sequence, and the slot that a message is about; None behind the last one."""
    header = message.header
    sequence = sequence_of(talk, header.sender if header.receiver == SERVER else header.receiver)
    return sequence, sequence.slot(header.seq) if header.seq <= sequence.last else None


def belongs(talk, message):
    """Whether the plan has a message's kind at its place."""
    sequence, slot = place_of(talk, message)
    kind = message.header.kind
    if kind is Kind.FINISH:
        return message.header.seq == sequence.last_answer or talk.config.run.patience > 0
    return slot is not None and kind in kinds_at(sequence, slot)[message.header.receiver != SERVER]


@pytest.mark.parametrize("receiver", [SERVER, "north"])
@pytest.mark.parametrize("run", RUNS | PATIENT)
def test_every_kind_at_every_place_is_answered_or_refused_and_changes_nothing(run, receiver):
    talk = dialogue(run)
    counts, seen = {"applied": 0, "refused": 0}, set()
    for name, genuine in talk.walk():
        sequence, slot = place_of(talk, genuine)
        sort = slot and (slot.half, slot.item.purpose, slot.item.ends_block)
        if name != receiver or sort in seen or (slot and slot.item.epoch < sequence.plan.epochs):
            continue
        seen.add(sort)
        rows = len(slot.item.rows) if slot else 1
        plain = {name: value for name, value in genuine.scalars.items() if name in ("best", "judged")}
        role, before = talk.clone(name), copied(talk.roles[name].snapshot(None))
        for forged in forgeries(genuine, role.payload, rows or 1, plain):
            what = forged.header.kind, forged.header, forged.scalars.keys()
            try:
                effects = role.on(forged)
            except Refused as refusal:
                counts["refused"] += 1
                assert_unchanged(before, role.snapshot(None), what)
                if counts["refused"] % 5 == 0:
                    sendable(role, role.refused(forged.header, refusal))
                    role = talk.clone(name)
            else:
                assert belongs(talk, forged), what
                assert forged.header.kind not in ONLY or slot.item.purpose is ONLY[forged.header.kind], what
                counts["applied"] += 1
                sendable(role, effects)
                role = talk.clone(name)
    assert counts["applied"] > 3 or (run == "split_frozen" and receiver == "north")
    assert counts["refused"] > (5 if run == "split_frozen" and receiver == "north" else 20)  # which gets FINISH alone


@pytest.mark.parametrize("run", RUNS | PATIENT)
def test_what_belongs_is_never_refused(run):
    talk = dialogue(run)
    assert all(belongs(talk, genuine) for _, genuine in talk.walk())
    assert talk.roles[SERVER].refusals == {}
    for site in talk.config.run.sites:
        assert talk.roles[site].finished
        assert talk.roles[site].best == talk.roles[SERVER].evaluation.best > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("run", RUNS | PATIENT)
def test_a_run_with_forgeries_goes_on_to_its_end(run, seed):
    """One message in seven is replaced: what comes behind it is applied all the same."""
    talk, dice = dialogue(run), random.Random(f"{run}/{seed}")
    swapped, error = 0, None
    try:
        for name, genuine in talk.walk():
            slot = place_of(talk, genuine)[1]
            if slot is not None and dice.random() < 1 / 7:
                plain = {n: value for n, value in genuine.scalars.items() if n in ("best", "judged")}
                made = forgeries(genuine, talk.roles[name].payload, len(slot.item.rows) or 1, plain)
                lies = [forged for forged in made if forged.header.kind is not Kind.FINISH]
                if lies:
                    talk.swap(genuine, dice.choice(lies))
                    swapped += 1
    except RunError as stopped:
        error = stopped
    assert error is None or error.number == 603  # a gradient may be large enough to spoil a bottom
    assert swapped


@pytest.mark.parametrize("sites", [("north",)])
def test_a_farewell_that_cannot_be_used_ends_the_run_all_the_same(sites):
    talk = dialogue("split_labels", sites)
    for _, genuine in talk.walk():
        if genuine.header.kind is Kind.FINISH:
            talk.swap(genuine, Message(genuine.header, genuine.tensors, {**genuine.scalars, "best": 10**6}))
    assert talk.roles["north"].finished
    assert talk.roles["north"].best == talk.roles[SERVER].evaluation.best


class NorthIsSlow(random.Random):
    def choice(self, working):
        return super().choice([name for name in working for _ in range(1 if name == "north" else 8)])


def test_an_end_that_comes_early_answers_those_who_wait_for_an_averaging():
    """Else the farewell would stand behind an answer that never comes. East waits while north ends its evaluation."""
    run = {"order": "fair", "bottoms": "averaged", "window": 1, "average_every": 1, "epochs": 12, "patience": 1}
    talk = Dialogue(tiny_config(("north", "east"), **run), NorthIsSlow(0))
    assert all(talk.walk())
    assert talk.roles[SERVER].evaluation.evaluated < 12


TARGETS = {
    "binary": ((0.0, 1.0), (0.5, -1.0, 2.0, 1e30)),
    "multiclass": ((0, 1, 2), (3, 99, -1, -101, 2**63 - 1)),
    "regression": ((-1e6, 0.5, 1e6), (1e20, -3e38)),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_are_of_the_task(kind):
    task = TaskSection(kind=kind, classes=3)
    sequence = StreamSequence(Plan(4, 0, 0, 4, 1, 1, None, 1), has_head=False)
    header = Header("night", "north", SERVER, Kind.SMASHED, 1)

    def offer(value):
        targets = torch.tensor([value, 0, 0, 0], dtype=torch.int64 if kind == "multiclass" else torch.float32)
        return check_upload(Message(header, {"smashed": torch.zeros(4, 8), "targets": targets}), sequence, task)

    good, bad = TARGETS[kind]
    assert all(offer(value).seq == 1 for value in good)
    for value in bad:
        with pytest.raises(Refused, match="E304"):
            offer(value)


HELLO = {
    "train": 40,
    "validation": 10,
    "test": 10,
    "mark": 0,
    "released": 0,
    "log_lines": 0,
    "log_head": "",
    "sent": 0,
    "enrolled": True,
    "first_missing": 0,
    "last_missing": 0,
}


def hello(config, **changed):
    scalars = {"incarnation": "north-1", "contract": config.digest, **HELLO, **changed}
    return Message(Header("night", "north", SERVER, Kind.HELLO, 0), scalars=scalars)


@pytest.mark.parametrize(
    ("changed", "number"),
    [
        ({"train": 2**63 - 1}, 308),
        ({"test": 10**9}, 308),
        ({"incarnation": "n" * 250_000}, 304),
        ({"mark": 2**63 - 1, "released": 2**63 - 1}, 304),
        ({"mark": 3, "released": 4}, 304),
        ({"mark": -1, "released": -1}, 304),
        ({"sent": 2**63 - 1}, 304),
        ({"first_missing": 1, "last_missing": 2**63 - 1}, 304),
        ({"first_missing": -1, "last_missing": -1}, 304),
    ],
)
@pytest.mark.parametrize("run", RUNS)
def test_a_hello_has_sane_counts(run, changed, number):
    server = dialogue(run).roles[SERVER]
    before = copied(server.snapshot(None))
    with pytest.raises(Refused, match=f"E{number}"):
        server.on(hello(server.config, **changed))
    assert_unchanged(before, server.snapshot(None), changed)


def test_no_hello_with_negative_counts_is_read():
    config = tiny_config(("north",))
    payload, message = sketch(config)[Kind.HELLO], hello(config, validation=-1)
    with pytest.raises(Refused, match="E307"):
        wire.encode(message, payload, 2**20)


def test_a13_a_site_gets_a_thousand_answers_to_hellos():
    server = dialogue("split_labels").roles[SERVER]
    effects = []
    for number in range(HELLO_ANSWERS_MAX):
        changed = {"enrolled": False} if number % 2 else {"contract": "another"}
        effects += server.on(hello(server.config, incarnation=str(number), **changed))
    assert len(effects) == HELLO_ANSWERS_MAX
    restored = dialogue("split_labels").roles[SERVER]
    restored.restore(server.snapshot(None))
    for role in (server, restored):
        for changed in ({"enrolled": False}, {"contract": "another"}):
            with pytest.raises(Refused, match="E308"):
                role.on(hello(server.config, incarnation="more", **changed))
        effects = role.on(hello(server.config, incarnation="genuine"))
        assert Expect("north", 0) in effects, "a site that has enrolled goes on"


def test_hellos_are_not_hoarded():
    server = dialogue("split_labels").roles[SERVER]
    sizes = []
    for number in range(100):
        server.on(hello(server.config, incarnation=f"{number:064}"))
        sizes.append(len(str(server.snapshot(None).facts)))
    assert sizes[-1] - sizes[20] < 3, "one digit more of a count"
