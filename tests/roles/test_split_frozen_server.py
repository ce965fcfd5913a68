"""The server's side of split_frozen: what is stored first and trained on afterwards, without any answer."""

import pytest

from nightsplit.shared.engine.effects import Record
from nightsplit.shared.wire.message import Kind
from tests.harness.effects import exact, refusal_of, restored, seen
from tests.harness.pure_roles import pure_server
from tests.roles.streams import ALL_SITES, ILLEGIBLE, config_of, ends, evaluations, opened, smashed


def frozen_messages(site, batches, rows):
    parts = [12] * batches + [rows, rows]
    return [smashed(site, seq, length, seed=seq) for seq, length in enumerate(parts, 1)]


def test_split_frozen_stores_first_and_trains_when_all_is_there():
    config = config_of("split_frozen", epochs=2)
    server = opened(config)
    for message in [*frozen_messages("south", 2, 6), *frozen_messages("east", 1, 4)]:
        assert server.next() == []
        assert server.on(message) == []
    any_loss = pytest.approx(0.7, abs=0.2)
    recorded, steps = [], []
    for _ in range(6):
        twin = restored(server, pure_server(config, server.top.store))
        effects = server.next()
        assert exact(twin.next()) == exact(effects)
        lines, others = evaluations(effects)
        recorded.append(lines)
        steps.append(seen(others))
    assert recorded == [[], [], ALL_SITES, [], [], ALL_SITES]
    assert [step[0] for step in steps] == [
        Record({"event": "train", "step": step, "epoch": 1 + (step > 3), "loss": any_loss}) for step in range(1, 7)
    ]  # fmt: skip
    verdict = {"best": server.evaluation.best, "judged": 2}
    assert [step[1:] for step in steps[:-1]] == [[]] * 5
    assert steps[-1][1:] == [ends(server, {"south": 0, "east": 0}, **verdict)], "the only message that they get"


def test_split_frozen_answers_no_refusal_and_does_without_what_it_was_about():
    server = opened(config_of("split_frozen"))
    for message in [*frozen_messages("south", 2, 6), *frozen_messages("east", 1, 4)]:
        if message.header.sender == "south" and message.header.seq == 2:
            assert refusal_of(server, smashed("south", 2, 12, version=1)).number == 304
            assert server.refused(message.header, ILLEGIBLE) == []
        else:
            assert server.on(message) == []
    assert [one.metrics["step"] for one in server.next()] == [1]
    effects = server.next()
    assert effects[0].metrics["step"] == 2
    assert seen(effects)[-1] == ends(server, {"south": 0, "east": 0}, best=1, judged=1)
    assert server.contribution("south")["samples"] == 12


def test_split_frozen_trains_on_what_a_site_gave_before_it_was_excluded():
    server = opened(config_of("split_frozen", quorum=1))
    server.on(frozen_messages("east", 1, 4)[0])
    for message in frozen_messages("south", 2, 6):
        server.on(message)
    assert [one.kind for one in server.exclude("east")] == [Kind.EXCLUDED]
    effects = [server.next() for _ in range(3)]
    assert [step[0].metrics["step"] for step in effects] == [1, 2, 3]
    assert seen(effects[-1])[-1] == ends(server, {"south": 0}, best=1, judged=1)
