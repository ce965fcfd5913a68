"""The server's side of the Stream shape, as in split_labels: each answer, averaging, judging, the end.

Messages are those of `tests.roles.streams`.
"""

import pytest
import torch

from nightsplit.shared.engine.effects import Again, Finish, Record
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.protocols.build import build_split_model
from nightsplit.shared.protocols.report import NO_FIGURES
from nightsplit.shared.wire.message import Kind
from tests.harness.effects import exact, from_site, refusal_of, restored, seen, sent
from tests.harness.pure_roles import NOWHERE, pure_server
from tests.roles.streams import (
    ALL_SITES,
    ILLEGIBLE,
    PROGRESS,
    config_of,
    cut_gradient,
    ends,
    evaluations,
    noted,
    opened,
    refused,
    samples,
    smashed,
    trained,
)

# ── split_labels ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def labels():
    return opened(config_of("split_labels"))


def reference(config, smashed, targets):
    """Loss and gradient at the cut, by the top as the run begins."""
    inputs = smashed.clone().requires_grad_()
    loss = loss_of(config.task, build_split_model(config, NOWHERE).parts.top(inputs), targets)
    loss.backward()
    return loss.item(), inputs.grad


def test_split_labels_answers_a_batch_with_the_gradient_at_the_cut(labels):
    loss, gradient = reference(labels.config, *samples(12))
    effects = labels.on(smashed("south", 1, 12))
    assert seen(effects) == [cut_gradient("south", 1), trained(1, "south", pytest.approx(loss))]
    assert torch.allclose(effects[0].tensors["gradient"], gradient)
    assert (labels.applied, labels.steps) == ({"south": 1, "east": 0}, 1)


def test_split_labels_from_the_first_batch_to_the_end(labels):
    ready = {"south", "east"}
    order = []
    script = {
        ("south", 1): smashed("south", 1, 12), ("south", 2): smashed("south", 2, 12),
        ("south", 3): smashed("south", 3, 6, 1), ("south", 4): smashed("south", 4, 6, 1),
        ("east", 1): smashed("east", 1, 12), ("east", 2): smashed("east", 2, 4), ("east", 3): smashed("east", 3, 4),
    }  # fmt: skip
    effects = {}
    while site := labels.choose(ready):
        place = site, labels.applied[site] + 1
        order.append(place)
        effects[place] = labels.on(script[place])
    assert order == [
        ("south", 1), ("south", 2), ("east", 1), ("south", 3), ("east", 2), ("south", 4), ("east", 3),
    ]  # fmt: skip
    any_loss = pytest.approx(0.7, abs=0.2)
    assert seen(effects["south", 2]) == [cut_gradient("south", 2), trained(2, "south", any_loss, staleness=1)]
    assert seen(effects["east", 1]) == [cut_gradient("east", 1), trained(3, "east", any_loss, staleness=2)]
    assert seen(effects["south", 3]) == [noted("south", 3)]
    assert seen(effects["east", 2]) == [noted("east", 2)]
    assert seen(effects["south", 4]) == [noted("south", 4)]
    recorded, others = evaluations(effects["east", 3])
    assert recorded == ALL_SITES
    assert seen(others) == [
        noted("east", 3, best=1, judged=1), ends(labels, {"south": 4, "east": 3}, best=1, judged=1)
    ]  # fmt: skip
    assert labels.choose(ready) is None
    sent_before = [Again("south", range(1, 6)), Again("east", range(1, 5))]
    assert seen(labels.start()) == [*sent_before, *seen(others)[1:]], "a server that is started again says it again"


def test_figures_are_those_of_the_top_on_what_was_sent(labels):
    config = labels.config
    for site, number in (("south", 2), ("east", 1)):
        for seq in range(1, number + 1):
            labels.refused(smashed(site, seq, 12).header, ILLEGIBLE)
    for site, first, rows, version in (("south", 3, 6, 1), ("east", 2, 4, 0)):
        labels.on(smashed(site, first, rows, version, seed=first))
        effects = labels.on(smashed(site, first + 1, rows, version, seed=first + 1))
    top = build_split_model(config, NOWHERE).parts.top.eval()
    found = {(one.metrics["site"], one.metrics["part"]): one.metrics for one in effects if isinstance(one, Record)}
    for site, part, rows, seed in (("south", "validation", 6, 3), ("east", "test", 4, 3)):
        values, targets = samples(rows, seed)
        with torch.no_grad():
            figures = measure(config.task, config.data, top(values), targets)
        said_of_it = {"event": "evaluate", "step": 0, "epoch": 1, "site": site, "part": part}
        assert found[site, part] == pytest.approx({**figures, **said_of_it})


@pytest.mark.parametrize(
    ("message", "number", "what"),
    [
        (smashed("south", 1, 12, version=1), 304, "bottom version 1, item 1 needs 0"),
        (smashed("south", 1, 11), 306, "11 rows, item 1 has 12"),
        (smashed("south", 5, 12), 304, "is outside a sequence of 4"),
        (from_site("south", Kind.BOTTOM, 1, 0, {"0.weight": torch.eye(8, 6)}), 304, "comes where smashed belongs"),
        (from_site("south", Kind.REPORT, 1, metrics=NO_FIGURES), 304, "comes where smashed belongs"),
        (
            from_site("south", Kind.SMASHED, 1, 0, {"smashed": torch.ones(12, 8), "targets": torch.full((12,), 0.5)}),
            304, "targets other than 0 and 1",
        ),
        (
            from_site("south", Kind.SMASHED, 1, 0, {"smashed": torch.full((12, 8), 3e38), "targets": torch.ones(12)}),
            312, "finite",
        ),
    ],
    ids=["version", "rows", "beyond", "bottom", "report", "targets", "infinite"],
)  # fmt: skip
def test_a_message_out_of_place_changes_nothing_and_is_told(labels, message, number, what):
    refusal = refusal_of(labels, message)
    assert refusal.number == number
    assert what in str(refusal)
    header = smashed("south", 1, 12).header
    assert seen(labels.refused(header, refusal)) == [
        sent("south", Kind.REFUSED, 1, reply_to=1, number=number, reason=refusal.sentence, **PROGRESS)
    ]  # fmt: skip
    assert (labels.applied["south"], labels.refusals["south"], labels.steps) == (1, 1, 0)


def test_no_more_of_a_long_reason_travels_than_it_may(labels):
    endless = Refused(304, "x" * 10_000, "none")
    (told,) = labels.refused(smashed("south", 1, 12).header, endless)
    assert told.scalars["reason"] == "x" * 500


def test_a_batch_of_a_block_that_was_refused_leaves_its_site_without_figures(labels):
    for message in (smashed("south", 1, 12), smashed("south", 2, 12), smashed("east", 1, 12)):
        labels.on(message)
    for seq in (3, 4):
        assert seen(labels.refused(smashed("south", seq, 6, 1).header, ILLEGIBLE)) == [refused("south", seq)]
    labels.on(smashed("east", 2, 4))
    recorded, others = evaluations(labels.on(smashed("east", 3, 4)))
    assert recorded == [("east", "validation"), ("east", "test"), ("overall", "validation"), ("overall", "test")]
    assert seen(others)[1] == ends(labels, {"south": 4, "east": 3}, best=1, judged=1)


def test_a_refusal_that_ends_the_run_is_told_before_the_farewell(labels):
    for message in (smashed("south", 1, 12), smashed("south", 2, 12), smashed("east", 1, 12),
                    smashed("south", 3, 6, 1), smashed("east", 2, 4), smashed("south", 4, 6, 1)):  # fmt: skip
        labels.on(message)
    recorded, others = evaluations(labels.refused(smashed("east", 3, 4).header, ILLEGIBLE))
    assert recorded == [one for one in ALL_SITES if one != ("east", "test")]
    assert seen(others) == [
        refused("east", 3, best=1, judged=1), ends(labels, {"south": 4, "east": 3}, best=1, judged=1)
    ]  # fmt: skip


def test_a_restored_server_gives_the_same_answers(labels):
    labels.on(smashed("south", 1, 12))
    labels.refused(smashed("east", 1, 12).header, ILLEGIBLE)
    again = restored(labels, pure_server(labels.config))
    for message in (smashed("south", 2, 12), smashed("east", 2, 4), smashed("south", 3, 6, 1),
                    smashed("south", 4, 6, 1), smashed("east", 3, 4)):  # fmt: skip
        assert exact(again.on(message)) == exact(labels.on(message))
    assert again.outcome() == labels.outcome()
    assert (again.contribution("east"), again.contribution("south")) == (
        labels.contribution("east"), labels.contribution("south"),
    )  # fmt: skip


def test_a_site_that_is_excluded_is_waited_for_no_more():
    server = opened(config_of("split_labels", quorum=1))
    for message in (smashed("south", 1, 12), smashed("south", 2, 12), smashed("south", 3, 6, 1)):
        server.on(message)
    assert seen(server.on(smashed("south", 4, 6, 1))) == [noted("south", 4)]
    recorded, others = evaluations(server.exclude("east"))
    assert recorded == ALL_SITES[:2] + ALL_SITES[4:]
    told, farewell = seen(others)
    assert (told.receiver, told.kind) == ("east", Kind.EXCLUDED)
    assert farewell == ends(server, {"south": 4}, best=1, judged=1)


def test_a_run_that_no_longer_improves_ends_behind_the_answer():
    server = opened(config_of("split_labels", epochs=5, patience=1, order="fair"))
    ended = False
    for epoch in range(5):
        for site, rows, number in (("south", 6, 4), ("east", 4, 3)):
            for place in range(1, number + 1):
                seq = epoch * number + place
                item = server.sequences[site].slot(seq).item
                # Training is refused, so the second epoch is as good as the first.
                message = smashed(site, seq, rows if item.evaluates else 12, item.version)
                effects = server.on(message) if item.evaluates else server.refused(message.header, ILLEGIBLE)
                ended = any(isinstance(one, Finish) for one in seen(effects))
        if ended:
            break
    assert epoch == 1
    _, others = evaluations(effects)
    assert seen(others) == [
        noted("east", 6, best=1, judged=2), ends(server, {"south": 8, "east": 6}, best=1, judged=2)
    ]  # fmt: skip


# ── averaged bottoms ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def averaged():
    """South has averagings behind both of its batches, east behind its only one."""
    server = opened(config_of("split_labels", bottoms="averaged", average_every=1, window=1, quorum=1))
    server.on(smashed("south", 1, 12))
    server.on(smashed("east", 1, 12))
    return server


def bottom(site, seq, value, version=1):
    return from_site(
        site, Kind.BOTTOM, seq, version, {"0.weight": torch.full((8, 6), value), "0.bias": torch.full((8,), value)}
    )  # fmt: skip


def average(site, seq):
    shapes = {"0.weight": (8, 6), "0.bias": (8,)}
    return sent(site, Kind.AVERAGE, seq, reply_to=seq, shapes=shapes, **PROGRESS)


def test_bottoms_are_averaged_by_training_samples_when_all_are_there(averaged):
    assert averaged.on(bottom("south", 2, 3.0)) == []
    assert averaged.choose({"south", "east"}) == "east", "south waits for the mean"
    again = restored(averaged, pure_server(averaged.config))
    for server in (averaged, again):
        effects = server.on(bottom("east", 2, 0.0))
        assert seen(effects) == [average("south", 2), average("east", 2)]
        for effect in effects:
            assert torch.allclose(effect.tensors["0.bias"], torch.full((8,), 2.0))  # 24 of 36 samples are south's
        assert server.choose({"south", "east"}) == "south"
        server.on(smashed("south", 3, 12, 2))
        assert seen(server.on(bottom("south", 4, 5.0, 3))) == [average("south", 4)], "east has no more averagings"


def test_a_bottom_that_nobody_asked_for_is_refused(averaged):
    assert refusal_of(averaged, bottom("south", 1, 3.0)).number == 304
    assert refusal_of(averaged, bottom("south", 2, 3.0, version=0)).number == 304
    assert refusal_of(averaged, bottom("south", 2, float("nan"))).number == 312
    assert refusal_of(averaged, smashed("south", 2, 12, 1)).number == 304


def test_a_bottom_that_was_refused_has_no_part_in_the_mean(averaged):
    averaged.on(bottom("south", 2, 3.0))
    effects = averaged.refused(bottom("east", 2, 0.0).header, ILLEGIBLE)
    assert seen(effects) == [refused("east", 2), average("south", 2)]
    assert torch.equal(effects[1].tensors["0.bias"], torch.full((8,), 3.0))


def test_a_site_that_is_excluded_has_no_part_in_the_mean(averaged):
    averaged.on(bottom("south", 2, 3.0))
    told, mean = averaged.exclude("east")
    assert told.kind is Kind.EXCLUDED
    assert seen([mean]) == [average("south", 2)]
    assert torch.equal(mean.tensors["0.bias"], torch.full((8,), 3.0))
