"""The site's side of the Round systems: batches of training, the update in three slices, the model that answers it.

East has twelve training samples here, so a round is two batches.
"""

import json

import pytest
import torch

from nightsplit.shared.engine.effects import Finish, Record, Spend
from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.protocols.data_vectors import SCALES
from nightsplit.shared.protocols.report import NO_FIGURES
from nightsplit.shared.wire.message import SERVER, Kind
from tests.harness.effects import (
    Sent,
    exact,
    from_server,
    greeting,
    manifest,
    refusal_of,
    restored,
    seen,
    sent,
)
from tests.harness.night import tiny_rounds
from tests.harness.pure_roles import pure_site

LENGTHS = {
    "fedavg_transfer": (8192, 8192, 1665),
    "data_vectors": (8192, 8192, 1665),
    "fedavg_dp_seg": (8192, 8192, 1153),
}
AVERAGING = ["fedavg_transfer", "fedavg_dp_seg"]
ILLEGIBLE = Refused(306, "it was short.", "send it whole.")


def enrolled(protocol, **settings):
    rounds = {} if protocol == "data_vectors" else {"rounds": 2}
    site = pure_site(tiny_rounds(("south", "east"), protocol=protocol, **{**rounds, **settings}), "east")
    site.start()
    site.on(manifest(site.config))
    return site


def again(site, first_unconfirmed=None):
    """The same site in its next process, from a checkpoint."""
    return restored(site, pure_site(site.config, "east", 2), first_unconfirmed)


def everything(site):
    """What a site does and sends before it waits."""
    effects = []
    while more := site.next():
        effects += more
    return effects


def worked(step):
    return Record({"event": "local", "step": step})


def update(protocol, first, version, figures=NO_FIGURES):
    """The three slices of an update; figures go with the last one."""
    return [
        sent(SERVER, Kind.UPDATE, first + place, version=version, shapes={"values": (length,)},
             metrics=figures if place == 2 else NO_FIGURES)
        for place, length in enumerate(LENGTHS[protocol])
    ]  # fmt: skip


def slices(kind, first, vector, **fields):
    """A model or a farewell in its three messages."""
    parts = vector.split(8192)
    return [from_server(kind, first + place, tensors={"values": part}, **fields) for place, part in enumerate(parts)]


def model(site, number, vector=None, **changed):
    """The model that answers update `number`."""
    vector = site.base + 0.01 if vector is None else vector
    fields = {"reply_to": 3 * number, "version": number, "best": 0, "judged": 0, "final": False, **changed}
    return slices(Kind.MODEL, 3 * number - 2, vector, **fields)


def farewell(site, seq, version, **verdict):
    return slices(Kind.FINISH, seq, site.base, version=version, summary="null", **verdict)


def give(site, messages):
    for message in messages:
        assert site.on(message) == []


def figures_of(effects):
    """The text in the last message."""
    return effects[-1].scalars["metrics"]


# ── fedavg_transfer and fedavg_dp_seg ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", AVERAGING)
def test_a_site_trains_reports_and_ends(protocol):
    site = enrolled(protocol)
    trained = [worked(2), worked(4)] if protocol == "fedavg_transfer" else [Spend(2), Spend(4)]
    assert seen(everything(site)) == [worked(0), worked(1), trained[0], *update(protocol, 1, 0)]
    first, second, third = model(site, 1)
    assert site.on(first) == site.next() == []
    assert site.on(second) == site.next() == site.on(third) == []
    effects = everything(site)
    judged = figures_of(effects)
    assert seen(effects) == [worked(2), worked(3), trained[1], *update(protocol, 4, 1, judged)]
    assert json.loads(judged)["validation"]["samples"] == 4.0
    give(site, model(site, 2, final=True, best=1, judged=1))
    effects = everything(site)
    assert seen(effects) == [worked(4), sent(SERVER, Kind.REPORT, 7, version=2, metrics=figures_of(effects))]
    *begun, last = farewell(site, 7, 2, best=2, judged=2)
    give(site, begun)
    assert seen(site.on(last)) == [Finish()]
    assert site.next() == []
    assert seen(again(site).start()) == [Finish()]


def test_an_update_is_what_training_changed_and_training_begins_with_the_model():
    site = enrolled("fedavg_transfer")
    values = torch.cat([effect.tensors["values"] for effect in everything(site)[3:]])
    assert torch.equal(values, site.layout.vector(site.trainer.weights()) - site.published)
    assert values.abs().max() > 0
    given = site.published + values / 2
    give(site, model(site, 1, given))
    site.next()
    assert torch.equal(site.layout.vector(site.trainer.weights()), site.layout.vector(site.layout.weights(given)))


@pytest.mark.parametrize("protocol", AVERAGING)
def test_nothing_private_leaves_before_it_is_paid_for(protocol):
    site = enrolled(protocol)
    kinds = [type(effect).__name__ for effect in everything(site)]
    assert kinds.index("Send") == 3
    assert ("Spend" in kinds[:3]) is (protocol == "fedavg_dp_seg") is (site.account is not None)


@pytest.mark.parametrize("protocol", AVERAGING)
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_a_checkpoint_between_any_two_batches_changes_no_bit(protocol, turns):
    site = enrolled(protocol)
    for _ in range(turns):
        site.next()
    other = again(site)
    assert exact(everything(other)) == exact(everything(site))


def test_what_was_not_confirmed_is_sent_again_to_the_bit():
    site = enrolled("fedavg_transfer")
    sends = exact(everything(site))[3:]
    assert exact(everything(again(site, first_unconfirmed=2))) == sends[1:]
    assert everything(again(site)) == []


def test_an_update_is_sent_again_as_it_was_though_its_model_is_here():
    site = enrolled("fedavg_transfer")
    sends = exact(everything(site))[3:]
    give(site, model(site, 1))
    other = again(site, first_unconfirmed=2)
    following = exact(everything(site))
    assert [send.version for send in sends + following[3:]] == [0, 0, 0, 1, 1, 1]
    assert exact(everything(other)) == [*sends[1:], *following]


def test_a_model_that_is_half_here_is_whole_after_a_restore():
    site = enrolled("fedavg_transfer")
    everything(site)
    first, *rest = model(site, 1)
    give(site, [first])
    other = again(site)
    for role in (site, other):
        give(role, rest)
    assert exact(everything(other)) == exact(everything(site))


def test_a_model_waits_for_the_update_that_it_answers_to_be_made_again():
    site = enrolled("fedavg_transfer")
    site.next()
    assert site.choose({SERVER}) is None
    everything(site)
    assert site.choose({SERVER}) == SERVER


def test_the_first_stored_answer_is_told_once():
    site = enrolled("fedavg_transfer")
    everything(site)
    give(site, model(site, 1)[:2])
    site.snapshot(None)
    told = greeting(site.config, "east", mark=2, released=2, sent=site.next_seq - 1)
    assert seen(site.saved()) == [sent(SERVER, Kind.HELLO, 0, **told)]
    assert site.saved() == []


def changed(number, place=0, **fields):
    return lambda site: model(site, number, **fields)[place]


@pytest.mark.parametrize(
    ("message", "number"),
    [
        (changed(1, place=1), 304),
        (changed(1, reply_to=0), 304),
        (changed(1, version=0), 304),
        (changed(1, version=3), 304),
        (changed(1, final=True), 304),
        (changed(1, version=2), 304),
        (changed(1, best=1), 304),
        (changed(1, best=2, judged=2), 304),
        (changed(1, vector=torch.full((1665,), 0.5)), 306),
        (changed(1, vector=torch.full((18049,), 1e21)), 307),
        (lambda site: farewell(site, 1, 0, best=0, judged=0)[0], 304),
        (lambda site: from_server(Kind.REFUSED, 1, reply_to=1, number=304, reason="", best=0, judged=0), 304),
    ],
    ids=["slice 2", "reply_to", "old", "too new", "final", "final version", "unjudged", "future", "short", "huge",
         "farewell", "refused"],
)  # fmt: skip
def test_a_message_out_of_place_changes_nothing(message, number):
    site = enrolled("fedavg_transfer")
    everything(site)
    assert refusal_of(site, message(site)).number == number
    assert site.next() == []


def test_a_model_that_nobody_asked_for_is_refused():
    site = enrolled("fedavg_transfer")
    assert refusal_of(site, model(site, 1)[0]).number == 304
    everything(site)
    give(site, model(site, 1))
    assert refusal_of(site, model(site, 2)[0]).number == 304


def test_the_slices_of_two_models_do_not_become_one():
    site = enrolled("fedavg_transfer", rounds=3, close="quorum", order="fair", reports=1)
    everything(site)
    give(site, model(site, 1)[:1])
    assert refusal_of(site, model(site, 1, version=2)[1]).number == 304


def test_a_model_of_which_a_slice_was_refused_leaves_the_site_with_its_own():
    site = enrolled("fedavg_transfer")
    everything(site)
    first, second, third = model(site, 1)
    give(site, [first])
    assert site.refused(second.header, ILLEGIBLE) == []
    give(site, [third])
    assert torch.equal(site.base, site.published)
    assert seen(everything(site)) == [worked(2), worked(3), worked(4), *update("fedavg_transfer", 4, 1)]


def test_an_end_that_cannot_be_read_is_no_end():
    site = enrolled("fedavg_transfer", rounds=1)
    everything(site)
    for message in model(site, 1, final=True):
        assert site.refused(message.header, ILLEGIBLE) == []
    assert seen(everything(site)) == [worked(2), sent(SERVER, Kind.REPORT, 4, version=1, metrics=NO_FIGURES)]
    with pytest.raises(RunError) as stopped:
        site.refused(farewell(site, 4, 1, best=1, judged=1)[0].header, ILLEGIBLE)
    assert stopped.value.number == 601


# ── data_vectors ────────────────────────────────────────────────────────────────────────────────


def test_data_vectors_trains_once_and_judges_every_scale():
    site = enrolled("data_vectors")
    assert seen(everything(site)) == [worked(0), worked(1), worked(2), *update("data_vectors", 1, 0)]
    give(site, model(site, 1, final=True))
    other = again(site)
    effects = everything(site)
    assert exact(everything(other)) == exact(effects)
    report = Sent(
        SERVER, Kind.REPORT, 4, 0, 1, {"statistics": (len(SCALES), 256)}, {"metrics": figures_of(effects)}
    )  # fmt: skip
    assert seen(effects) == [worked(2), report]
    texts = json.loads(figures_of(effects))
    assert [json.loads(text)["test"]["samples"] for text in texts] == [4.0] * 11
    assert len(set(texts)) > 1, "scales differ"
    *begun, last = farewell(site, 4, 1, best=3, judged=11)
    give(site, begun)
    assert seen(site.on(last)) == [Finish()]
    assert site.best == 3


def test_data_vectors_has_no_more_scales_than_there_are():
    site = enrolled("data_vectors")
    everything(site)
    give(site, model(site, 1, final=True))
    everything(site)
    assert refusal_of(site, farewell(site, 4, 1, best=12, judged=12)[0]).number == 304
    assert refusal_of(site, model(site, 2, version=1, final=True)[0]).number == 304
