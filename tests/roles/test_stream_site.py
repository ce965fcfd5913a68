"""The site's side of the Stream systems: what leaves up to the window, and what each answer changes.

East has twelve training samples here, four for validation and four for the test, in batches of four:

    item       1  2  3  4  5
               T  T  T  V  S      with bottoms averaged an A behind every second T
    version    0  0  1  2  2      with window 2
"""

import pytest
import torch

from nightsplit.shared.engine.effects import Finish
from nightsplit.shared.errors import RunError
from nightsplit.shared.protocols.report import NO_FIGURES
from nightsplit.shared.wire.message import SERVER, Header, Kind
from tests.harness.effects import exact, from_server, greeting, manifest, refusal_of, restored, seen, sent
from tests.harness.night import tiny_config
from tests.harness.pure_roles import pure_site

PROGRESS = {"best": 0, "judged": 0}
BATCH = {"smashed": (4, 8), "targets": (4,)}
GRADIENT = {"gradient": torch.ones(4, 8)}


def config_of(protocol, **run):
    return tiny_config(("east",), **{"protocol": protocol, "window": 2, "epochs": 1, "batch_size": 4, **run})


def enrolled(config):
    site = pure_site(config, "east")
    site.start()
    site.on(manifest(config))
    return site


def smashed(seq, version, shapes=BATCH):
    return sent(SERVER, Kind.SMASHED, seq, version=version, shapes=shapes)


def cut_gradient(seq, **changed):
    return from_server(Kind.CUT_GRADIENT, seq, **{"reply_to": seq, "tensors": GRADIENT, **PROGRESS, **changed})


def noted(seq, **changed):
    return from_server(Kind.NOTED, seq, **{"reply_to": seq, **PROGRESS, **changed})


def farewell(seq, **changed):
    return from_server(Kind.FINISH, seq, **{"reply_to": seq, "summary": "null", "best": 1, "judged": 1, **changed})


def everything(site):
    """What a site sends before it waits."""
    effects = []
    while more := site.next():
        assert len(more) == 1
        effects += more
    return effects


# ── split_labels ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def labels():
    return enrolled(config_of("split_labels"))


def test_split_labels_sends_its_plan_as_far_as_the_window_allows(labels):
    assert seen(everything(labels)) == [smashed(1, 0), smashed(2, 0)]
    assert labels.on(cut_gradient(1)) == []
    assert seen(everything(labels)) == [smashed(3, 1)]
    assert labels.on(cut_gradient(2)) == []
    assert seen(everything(labels)) == [smashed(4, 2)]
    assert labels.on(cut_gradient(3)) == []
    assert seen(everything(labels)) == [smashed(5, 2)]
    assert labels.on(noted(4)) == labels.on(noted(5, best=1, judged=1)) == []
    assert everything(labels) == []
    assert seen(labels.on(farewell(6))) == [Finish()]
    assert everything(labels) == []
    assert seen(labels.start()) == [Finish()]


def test_what_a_gradient_changes_is_seen_a_window_later():
    sites = [enrolled(config_of("split_labels", dropout=0.0)) for _ in range(3)]
    second = [exact(everything(site))[1] for site in sites]
    assert second[0] == second[1] == second[2]
    sites[0].on(cut_gradient(1))
    sites[1].on(cut_gradient(1))
    sites[2].on(from_server(Kind.REFUSED, 1, reply_to=1, number=306, reason="it was short", **PROGRESS))
    third = [exact(everything(site)) for site in sites]
    assert third[0] == third[1]
    assert third[0] != third[2], "who got no gradient has learned nothing"
    assert [len(sends) for sends in third] == [1, 1, 1]


def test_the_bottom_takes_the_step_that_its_optimizer_would():
    site = enrolled(config_of("split_labels", dropout=0.0, optimizer="sgd"))
    everything(site)
    linear = torch.nn.Linear(6, 8)
    linear.load_state_dict({name.removeprefix("0."): value for name, value in site.bottom.weights(0).items()})
    torch.relu(linear(site.batches.inputs(site.sequence.slot(1).item))).backward(GRADIENT["gradient"])
    site.on(cut_gradient(1))
    stepped = site.bottom.weights(1)
    assert torch.allclose(stepped["0.weight"], linear.weight - 0.01 * linear.weight.grad)
    assert torch.allclose(stepped["0.bias"], linear.bias - 0.01 * linear.bias.grad)


@pytest.mark.parametrize(
    ("message", "number", "what"),
    [
        (from_server(Kind.AVERAGE, 1, reply_to=1, tensors={"0.weight": torch.eye(8, 6)}, **PROGRESS), 304, "belongs"),
        (from_server(Kind.NOTED, 1, reply_to=1, **PROGRESS), 304, "belongs"),
        (cut_gradient(1, reply_to=2), 304, "answers message 2"),
        (cut_gradient(6), 304, "is outside a sequence of 5"),
        (cut_gradient(1, tensors={"gradient": torch.ones(3, 8)}), 306, "3 rows, item 1 has 4"),
        (cut_gradient(1, best=1, judged=1), 304, "epoch 1 as the best"),
        (cut_gradient(1, tensors={"gradient": torch.full((4, 8), torch.inf)}), 312, "gradients"),
        (farewell(1, best=0, judged=0), 304, "not at its end"),
    ],
    ids=["average", "noted", "reply_to", "beyond", "rows", "verdict", "infinite", "early"],
)
def test_an_answer_out_of_place_changes_nothing_and_counts_as_none(labels, message, number, what):
    everything(labels)
    refusal = refusal_of(labels, message)
    assert refusal.number == number
    assert what in refusal.sentence
    assert labels.refused(Header("night", SERVER, "east", message.header.kind, 1), refusal) == []
    assert seen(everything(labels)) == [smashed(3, 1)]
    assert labels.bottom.weights(1) is labels.bottom.weights(0)


def test_a_farewell_that_cannot_be_used_ends_the_run_all_the_same(labels):
    for seq in range(1, 6):
        everything(labels)
        labels.on(cut_gradient(seq) if seq < 4 else noted(seq))
    refusal = refusal_of(labels, farewell(6, best=10, judged=10))
    assert labels.refused(farewell(6).header, refusal) == []
    assert seen(labels.next()) == [Finish()]
    assert labels.next() == []


def test_the_first_stored_answer_is_told_once(labels):
    config = labels.config
    everything(labels)
    labels.on(cut_gradient(1))
    assert labels.saved() == [], "it is in no checkpoint yet"
    labels.snapshot(None)
    labels.on(cut_gradient(2))
    told = greeting(config, "east", mark=2, released=1, sent=labels.next_seq - 1)
    assert seen(labels.saved()) == [sent(SERVER, Kind.HELLO, 0, **told)]
    labels.snapshot(None)
    assert labels.saved() == []


def test_what_was_not_confirmed_is_sent_again_to_the_bit(labels):
    first = exact(everything(labels))
    labels.on(cut_gradient(1))
    third = exact(everything(labels))
    again = restored(labels, pure_site(labels.config, "east", 2), first_unconfirmed=2)
    assert exact(everything(again)) == [*first[1:], *third]
    confirmed = restored(labels, pure_site(labels.config, "east", 3))
    assert everything(confirmed) == []
    for site in (labels, again, confirmed):
        assert site.on(cut_gradient(2)) == []
    following = exact(everything(labels))
    assert [send.seq for send in following] == [4]
    assert exact(everything(again)) == exact(everything(confirmed)) == following


def test_an_answer_may_be_here_before_its_message_is_sent_again(labels):
    sends = exact(everything(labels))
    again = restored(labels, pure_site(labels.config, "east", 2), first_unconfirmed=1)
    assert again.on(cut_gradient(1)) == []
    assert exact(everything(again))[:2] == sends
    labels.on(cut_gradient(1))
    assert exact(everything(labels))[0].version == 1


def test_the_best_bottom_is_kept_until_it_cannot_be_the_best_any_more():
    site = enrolled(config_of("split_labels", epochs=2, window=1))
    bottoms = {}
    for seq in range(1, 11):
        everything(site)
        if seq in (4, 9):
            bottoms[seq // 4] = {name: tensor.tolist() for name, tensor in site.bottom.weights(seq - 1).items()}
        verdict = {"best": seq // 5 and 1, "judged": seq // 5}
        site.on(noted(seq, **verdict) if seq in (4, 5, 9, 10) else cut_gradient(seq, **verdict))
    assert bottoms[1] != bottoms[2]
    site = restored(site, pure_site(site.config, "east", 2))
    assert seen(site.on(farewell(11, best=1, judged=2))) == [Finish()]
    assert {name: tensor.tolist() for name, tensor in site.model()["bottom"].items()} == bottoms[1]


def test_the_top_comes_with_the_farewell_where_the_run_exports_it():
    site = enrolled(config_of("split_labels", export_top=True))
    for seq in range(1, 6):
        everything(site)
        site.on(cut_gradient(seq) if seq < 4 else noted(seq))
    top = {name: torch.ones(spec.shape) for name, spec in site.payload(Kind.FINISH).tensors.items()}
    assert len(top) == 6
    site.on(farewell(6, tensors=top))
    assert site.model()["top"].keys() == top.keys()
    again = restored(site, pure_site(site.config, "east", 2))
    assert seen(again.start()) == [Finish()]
    assert again.model()["top"].keys() == top.keys()


# ── averaged bottoms ────────────────────────────────────────────────────────────────────────────

BOTTOM = {"0.weight": (8, 6), "0.bias": (8,)}


def mean(value):
    return {name: torch.full(shape, value) for name, shape in BOTTOM.items()}


@pytest.fixture
def averaged():
    site = enrolled(config_of("split_labels", bottoms="averaged", average_every=2, dropout=0.0))
    everything(site)
    site.on(cut_gradient(1))
    return site


def test_a_bottom_is_sent_behind_its_batches_and_its_mean_comes_back(averaged):
    assert seen(everything(averaged)) == [sent(SERVER, Kind.BOTTOM, 3, version=1, shapes=BOTTOM)]
    averaged.on(cut_gradient(2))
    assert seen(everything(averaged)) == [smashed(4, 2)]
    sent_then, stepped = averaged.bottom.weights(1), averaged.bottom.weights(2)
    assert averaged.on(from_server(Kind.AVERAGE, 3, reply_to=3, tensors=mean(0.5), **PROGRESS)) == []
    merged = averaged.bottom.weights(3)
    for name in BOTTOM:
        assert torch.allclose(merged[name], 0.5 + stepped[name] - sent_then[name])
    assert seen(everything(averaged)) == [smashed(5, 3)], "V is a window behind A and T"


def test_an_average_is_obeyed_where_it_was_asked_for_alone(averaged):
    everything(averaged)
    refusal = refusal_of(averaged, from_server(Kind.AVERAGE, 2, reply_to=2, tensors=mean(0.5), **PROGRESS))
    assert refusal.number == 304
    assert refusal_of(averaged, cut_gradient(3)).number == 304
    infinite = from_server(Kind.AVERAGE, 3, reply_to=3, tensors=mean(torch.inf), **PROGRESS)
    assert refusal_of(averaged, infinite).number == 312


# ── split_u ─────────────────────────────────────────────────────────────────────────────────────

ONE_HALF = {"smashed": (4, 8)}


@pytest.fixture
def u_shaped():
    return enrolled(config_of("split_u"))


def head_input(seq, **changed):
    activations = torch.linspace(-1, 1, 32).reshape(4, 8)
    return from_server(
        Kind.HEAD_INPUT, seq, **{"reply_to": seq, "tensors": {"activations": activations}, **PROGRESS, **changed}
    )


def head_gradient(seq, version):
    return sent(SERVER, Kind.HEAD_GRADIENT, seq, version=version, shapes={"gradient": (4, 8)})


def report(seq, version, metrics=NO_FIGURES):
    return sent(SERVER, Kind.REPORT, seq, version=version, metrics=metrics)


def test_split_u_sends_second_halves_half_a_window_behind_the_first(u_shaped):
    assert seen(everything(u_shaped)) == [smashed(1, 0, ONE_HALF), smashed(2, 0, ONE_HALF)]
    assert u_shaped.on(head_input(1)) == []
    assert seen(everything(u_shaped)) == [head_gradient(3, 0)]
    assert u_shaped.on(head_input(2)) == []
    assert everything(u_shaped) == [], "item 3 needs the last word on item 1"
    assert u_shaped.on(cut_gradient(3)) == []
    assert seen(everything(u_shaped)) == [smashed(4, 1, ONE_HALF), head_gradient(5, 0)]
    assert u_shaped.on(head_input(4)) == u_shaped.on(cut_gradient(5)) == []
    assert seen(everything(u_shaped)) == [smashed(6, 2, ONE_HALF), head_gradient(7, 1)]
    assert u_shaped.on(head_input(6)) == u_shaped.on(cut_gradient(7)) == []
    assert seen(everything(u_shaped)) == [smashed(8, 2, ONE_HALF), report(9, 2)]
    assert u_shaped.on(head_input(8)) == []
    (figures,) = everything(u_shaped)
    assert seen([figures]) == [report(10, 2, figures.scalars["metrics"])]
    assert '"samples": 4.0' in figures.scalars["metrics"]
    assert u_shaped.on(noted(9)) == u_shaped.on(noted(10, best=1, judged=1)) == []
    assert everything(u_shaped) == []
    assert seen(u_shaped.on(farewell(11))) == [Finish()]


def test_split_u_has_no_place_for_labels(u_shaped):
    assert "targets" not in u_shaped.payload(Kind.SMASHED).tensors
    assert u_shaped.payload(Kind.HEAD_GRADIENT).tensors.keys() == {"gradient"}


def test_a_head_input_that_cannot_be_used_is_followed_by_an_empty_report(u_shaped):
    everything(u_shaped)
    head = exact_weights(u_shaped.head.module)
    activations = {"activations": torch.full((4, 8), torch.nan)}
    refusal = refusal_of(u_shaped, head_input(1, tensors=activations))
    assert refusal.number == 312
    assert u_shaped.refused(head_input(1).header, refusal) == []
    assert seen(everything(u_shaped)) == [report(3, 0)]
    assert exact_weights(u_shaped.head.module) == head
    u_shaped.on(head_input(2))
    assert u_shaped.on(noted(3)) == []
    assert seen(everything(u_shaped)) == [smashed(4, 1, ONE_HALF), head_gradient(5, 0)]


def exact_weights(module):
    return {name: tensor.tolist() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (cut_gradient(1), 304),
        (noted(1), 304),
        (head_input(1, reply_to=3), 304),
        (head_input(1, tensors={"activations": torch.ones(5, 8)}), 306),
        (head_input(3), 304),
    ],
    ids=["gradient", "noted", "reply_to", "rows", "second half"],
)
def test_split_u_refuses_what_does_not_belong_to_the_half(u_shaped, message, number):
    everything(u_shaped)
    assert refusal_of(u_shaped, message).number == number
    assert everything(u_shaped) == []


def test_a_gradient_of_the_head_is_sent_again_after_a_restore(u_shaped):
    everything(u_shaped)
    u_shaped.on(head_input(1))
    gradient = exact(everything(u_shaped))
    again = restored(u_shaped, pure_site(u_shaped.config, "east", 2), first_unconfirmed=3)
    assert exact(everything(again)) == gradient
    assert exact_weights(again.head.module) == exact_weights(u_shaped.head.module), "it has learned once"


# ── split_frozen ────────────────────────────────────────────────────────────────────────────────


def test_split_frozen_sends_all_at_once_by_its_first_bottom_and_waits_for_the_end():
    site = enrolled(config_of("split_frozen", epochs=3))
    released = everything(site)
    assert seen(released) == [smashed(seq, 0) for seq in range(1, 6)]
    for message in (cut_gradient(1), noted(1), farewell(2)):
        assert refusal_of(site, message).number == 304
    again = restored(site, pure_site(site.config, "east", 2), first_unconfirmed=4)
    assert exact(everything(again)) == exact(released)[3:]
    for role in (site, again):
        assert seen(role.on(farewell(1))) == [Finish()]
        assert everything(role) == []


def test_split_frozen_ends_although_its_farewell_cannot_be_used():
    site = enrolled(config_of("split_frozen"))
    everything(site)
    refusal = refusal_of(site, farewell(1, best=2, judged=2))
    assert site.refused(farewell(1).header, refusal) == []
    assert seen(everything(site)) == [Finish()]


def test_a_bottom_whose_activations_are_not_finite_sends_nothing():
    site = enrolled(config_of("split_frozen"))
    with torch.no_grad():
        site.bottom.weights(0)["0.weight"].fill_(torch.nan)
    with pytest.raises(RunError) as stopped:
        site.next()
    assert stopped.value.number == 603
    assert site.next_seq == 1
