"""The server's side of the Round systems: when a round closes, what everybody goes on with, who is told what."""

import json

import pytest
import torch

from nightsplit.shared.engine.effects import Again, Finish, Record, Send
from nightsplit.shared.errors import Refused
from nightsplit.shared.protocols.data_vectors import SCALES
from nightsplit.shared.protocols.report import NO_FIGURES
from nightsplit.shared.wire.message import Kind
from tests.harness.effects import exact, from_site, hello, refusal_of, restored, seen, sent
from tests.harness.night import tiny_rounds
from tests.harness.pure_roles import pure_server

SITES = ("south", "east")
AVERAGING = ["fedavg_transfer", "fedavg_dp_seg"]
ILLEGIBLE = Refused(306, "it was short.", "send it whole.")


def opened(**settings):
    protocol = settings.get("protocol", "fedavg_transfer")
    rounds = {} if protocol == "data_vectors" else {"rounds": 2}
    server = pure_server(tiny_rounds(SITES, **{**rounds, **settings}))
    server.start()
    for site in SITES:
        server.on(hello(server.config, site))
    return server


def figures(auc, validation=4.0, test=4.0):
    """A report in which both parts have the same AUC."""
    parts = {"validation": validation, "test": test}
    return json.dumps({
        part: {"auc": auc, "balanced_accuracy": 0.5, "loss": 0.6, "samples": samples} for part, samples in parts.items()
    })  # fmt: skip


def update(server, site, number, value, metrics=NO_FIGURES, version=None):
    """A site's update `number`, all of one value, in its three messages."""
    parts = torch.full_like(server.vector, value).split(8192)
    version = number - 1 if version is None else version
    return [
        from_site(site, Kind.UPDATE, 3 * number - 2 + place, version, {"values": part},
             metrics=metrics if place == 2 else NO_FIGURES)
        for place, part in enumerate(parts)
    ]  # fmt: skip


def give(server, messages):
    """The effects of the last of several messages; the others have none."""
    *begun, last = messages
    for message in begun:
        assert server.on(message) == []
    return server.on(last)


def trained(step, site, epoch, staleness=0):
    line = {"event": "train", "step": step, "site": site, "epoch": epoch, "loss": None, "staleness": staleness}
    return Record(line)


def combined(step, version):
    return Record({"event": "combine", "step": step, "epoch": version})


def slices(server, kind, site, first, reply_to, version, **scalars):
    lengths = [len(part) for part in server.vector.split(8192)]
    return [
        sent(site, kind, first + place, reply_to, version, {"values": (length,)}, **scalars)
        for place, length in enumerate(lengths)
    ]  # fmt: skip


def model(server, site, number, version, final=False, best=0, judged=0):
    """The model that answers update `number`."""
    verdict = {"final": final, "best": best, "judged": judged}
    return slices(server, Kind.MODEL, site, 3 * number - 2, 3 * number, version, **verdict)


def ends(server, first, **verdict):
    """The farewell, whose slices begin with number `first` at every site."""
    scalars = {"summary": server.summary, **verdict}
    return Finish(tuple(
        send for site in SITES if site not in server.excluded
        for send in slices(server, Kind.FINISH, site, first, 0, server.version, **scalars)
    ))  # fmt: skip


def evaluated(epoch, step):
    return [
        {"event": "evaluate", "step": step, "epoch": epoch, "site": site, "part": part}
        for site in (*SITES, "overall")
        for part in ("validation", "test")
    ]


def without_figures(effects):
    return [
        {name: effect.metrics[name] for name in ("event", "step", "epoch", "site", "part")}
        for effect in effects
        if isinstance(effect, Record) and effect.metrics["event"] == "evaluate"
    ]


def values(effects, kind, site):
    """The vector in the slices of a kind for a site, of the farewell too."""
    said_at_last = [send for effect in effects if isinstance(effect, Finish) for send in effect.farewell]
    sends = [effect for effect in effects if isinstance(effect, Send)] + said_at_last
    return torch.cat([send.tensors["values"] for send in sends if (send.kind, send.receiver) == (kind, site)])


# ── fedavg_transfer and fedavg_dp_seg ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", AVERAGING)
def test_a_run_of_two_rounds_from_the_first_update_to_the_farewell(protocol):
    server = opened(protocol=protocol)
    everybody = set(SITES)
    assert server.choose({"east"}) is None
    assert server.choose(everybody) == "south"
    assert seen(give(server, update(server, "south", 1, 0.3))) == [trained(1, "south", 1)]
    assert server.choose(everybody) == "east"
    first = give(server, update(server, "east", 1, 0.0))
    assert seen(first) == [
        trained(2, "east", 1), combined(2, 1), *model(server, "south", 1, 1), *model(server, "east", 1, 1),
    ]  # fmt: skip
    torch.testing.assert_close(
        values(first, Kind.MODEL, "east"), server.published + 0.2
    )  # 24 of 36 samples are south's
    assert seen(give(server, update(server, "south", 2, 0.0, figures(0.9)))) == [trained(3, "south", 2)]
    second = give(server, update(server, "east", 2, 0.3, figures(0.9)))
    assert seen(second)[0] == trained(4, "east", 2)
    assert without_figures(second) == evaluated(1, 4)
    assert seen(second)[7:] == [
        combined(4, 2), *model(server, "south", 2, 2, True, 1, 1), *model(server, "east", 2, 2, True, 1, 1),
    ]  # fmt: skip
    torch.testing.assert_close(values(second, Kind.MODEL, "south"), server.published + 0.3)
    assert server.on(from_site("south", Kind.REPORT, 7, 2, metrics=figures(0.8))) == []
    last = server.on(from_site("east", Kind.REPORT, 7, 2, metrics=figures(0.8)))
    assert without_figures(last) == evaluated(2, 4)
    assert seen(last)[6:] == [ends(server, 7, best=1, judged=2)]
    assert json.loads(server.summary)["epoch"] == 1
    assert json.loads(server.summary)["overall"]["test"]["auc"] == pytest.approx(0.9)
    assert torch.equal(values(last, Kind.FINISH, "east"), values(first, Kind.MODEL, "east")), "the better of the two"
    assert server.choose(everybody) is None
    models = [Again(site, range(1, 7)) for site in SITES]
    assert exact(server.start()) == [*models, *exact(last)[6:]], "a server that is started again says it again"


def test_a_restored_server_gives_the_same_answers():
    server = opened()
    script = [
        *update(server, "south", 1, 0.25), *update(server, "east", 1, -0.5),
        *update(server, "south", 2, 0.1, figures(0.9)), *update(server, "east", 2, 0.7, figures(0.9)),
        from_site("south", Kind.REPORT, 7, 2, metrics=figures(0.8)),
        from_site("east", Kind.REPORT, 7, 2, metrics=figures(0.8)),
    ]  # fmt: skip
    for message in script:
        again = restored(server, pure_server(server.config))
        assert exact(again.on(message)) == exact(server.on(message))
        assert again.choose(set(SITES)) == server.choose(set(SITES))


def test_the_model_does_not_change_with_what_is_said_about_it():
    """What was sent belongs to the engine until it is confirmed."""
    server = opened()
    give(server, update(server, "south", 1, 0.3))
    first = give(server, update(server, "east", 1, 0.0))
    before = values(first, Kind.MODEL, "south").clone()
    give(server, update(server, "south", 2, 0.5, figures(0.9)))
    give(server, update(server, "east", 2, 0.5, figures(0.9)))
    assert torch.equal(values(first, Kind.MODEL, "south"), before)


@pytest.mark.parametrize(
    ("fields", "number", "what"),
    [
        ({"seq": 2}, 304, "out of turn"),
        ({"version": 1}, 304, "out of turn"),
        ({"kind": Kind.REPORT}, 304, "out of turn"),
        ({"tensors": {"values": torch.zeros(8191)}}, 306, "8191 values, slice 1 has 8192"),
        ({"tensors": {"values": torch.full((8192,), 1e21)}}, 307, "beyond 1e+20"),
        ({"metrics": figures(0.9)}, 304, "figures where none are due"),
    ],
    ids=["seq", "version", "report", "short", "huge", "figures"],
)
def test_a_message_out_of_place_changes_nothing(fields, number, what):
    server = opened()
    right = {"site": "south", "kind": Kind.UPDATE, "seq": 1, "version": 0, "tensors": {"values": torch.zeros(8192)}}
    refusal = refusal_of(server, from_site(**{**right, "metrics": NO_FIGURES, **fields}))
    assert (refusal.number, what in refusal.sentence) == (number, True)


def test_who_has_reported_is_heard_again_in_the_next_round():
    server = opened()
    give(server, update(server, "south", 1, 0.3))
    assert refusal_of(server, update(server, "south", 2, 0.3, version=0)[0]).number == 304
    assert server.choose({"south"}) is None


def test_an_update_of_which_a_slice_was_refused_does_not_count():
    server = opened()
    first, second, third = update(server, "south", 1, 0.3)
    assert server.on(first) == server.refused(second.header, ILLEGIBLE) == []
    again = restored(server, pure_server(server.config))
    for role in (server, again):
        assert seen(role.on(third)) == [trained(1, "south", 1)], "the site waits for its model like any other"
        effects = give(role, update(server, "east", 1, 0.6))
        assert seen(effects)[2:] == [*model(server, "south", 1, 1), *model(server, "east", 1, 1)]
        assert torch.allclose(values(effects, Kind.MODEL, "south"), role.published + 0.6)
        assert role.refusals == {"south": 1}


def test_a_report_that_was_refused_counts_without_figures():
    server = opened(rounds=1)
    for site in SITES:
        give(server, update(server, site, 1, 0.3))
    report = from_site("south", Kind.REPORT, 4, 1, metrics=figures(0.8, test=7.0))
    refusal = refusal_of(server, report)
    assert "has no figures of 6 validation, 6 test samples" in refusal.sentence
    assert server.refused(report.header, refusal) == []
    last = server.on(from_site("east", Kind.REPORT, 4, 1, metrics=figures(0.8)))
    assert without_figures(last) == evaluated(1, 2)[2:]
    assert seen(last)[4:] == [ends(server, 4, best=1, judged=1)]


def test_a_round_goes_on_without_a_site_that_is_excluded():
    server = opened(quorum=1)
    give(server, update(server, "south", 1, 0.3))
    for message in update(server, "east", 1, 0.9)[:2]:
        server.on(message)
    told, *others = server.exclude("east")
    assert (told.receiver, told.kind) == ("east", Kind.EXCLUDED)
    assert seen(others) == [combined(1, 1), *model(server, "south", 1, 1)]
    assert torch.allclose(values(others, Kind.MODEL, "south"), server.published + 0.3), "half an update is none"
    assert not any(name.startswith("open/") for name in server.snapshot(None).tensors), "nor is it kept"
    give(server, update(server, "south", 2, 0.0, figures(0.9)))
    last = server.on(from_site("south", Kind.REPORT, 7, 2, metrics=figures(0.8)))
    assert seen(last)[-1] == ends(server, 7, best=1, judged=2)


def test_the_last_report_is_not_waited_for_when_its_site_is_excluded():
    server = opened(quorum=1, rounds=1)
    for site in SITES:
        give(server, update(server, site, 1, 0.3))
    assert server.on(from_site("south", Kind.REPORT, 4, 1, metrics=figures(0.8))) == []
    effects = server.exclude("east")
    assert effects[0].kind is Kind.EXCLUDED
    assert without_figures(effects) == [line for line in evaluated(1, 2) if line["site"] != "east"]
    assert seen(effects)[-1] == ends(server, 4, best=1, judged=1)


def test_a_quorum_closes_at_its_deadline_and_who_is_late_counts_in_the_next_round():
    server = opened(order="fair", close="quorum", reports=1, deadline_hours=1.0, rounds=3)
    assert not server.may_close
    assert seen(give(server, update(server, "south", 1, 0.4))) == [trained(1, "south", 1)]
    assert server.may_close
    again = restored(server, pure_server(server.config))
    for role in (server, again):
        assert seen(role.close()) == [combined(1, 1), *model(server, "south", 1, 1)]
        assert not role.may_close
        assert seen(give(role, update(server, "east", 1, 0.6))) == [trained(2, "east", 2, staleness=1)]
        effects = give(role, update(server, "south", 2, 0.0))
        assert seen(effects) == [
            trained(3, "south", 2), combined(3, 2), *model(server, "east", 1, 2), *model(server, "south", 2, 2),
        ]  # fmt: skip
        moved = values(effects, Kind.MODEL, "east") - role.published
        assert torch.allclose(moved, torch.tensor(0.4 + 0.6 * 2**-0.5 / 3), atol=1e-6)


def test_a_quorum_without_a_deadline_closes_at_once():
    server = opened(order="fair", close="quorum", reports=1)
    effects = give(server, update(server, "east", 1, 0.4))
    assert seen(effects) == [trained(1, "east", 1), combined(1, 1), *model(server, "east", 1, 1)]


def test_a_buffer_answers_everybody_at_once():
    server = opened(order="fair", close="buffered", reports=2)
    assert seen(give(server, update(server, "east", 1, 0.3))) == [trained(1, "east", 1), *model(server, "east", 1, 0)]
    effects = give(server, update(server, "east", 2, 0.3, version=0))
    assert seen(effects) == [trained(2, "east", 1), combined(2, 1), *model(server, "east", 2, 1)]
    late = give(server, update(server, "south", 1, 0.3))
    assert seen(late) == [trained(3, "south", 2, staleness=1), *model(server, "south", 1, 1)]


def test_an_update_that_has_begun_goes_first():
    server = opened(order="fair", close="buffered", reports=2)
    assert server.choose(set(SITES)) == "south"
    server.on(update(server, "east", 1, 0.3)[0])
    assert server.choose(set(SITES)) == "east"


# ── data_vectors ────────────────────────────────────────────────────────────────────────────────


def scale_report(site, aucs, statistics):
    texts = json.dumps([figures(auc) for auc in aucs])
    return from_site(site, Kind.REPORT, 4, 1, {"statistics": torch.full((len(SCALES), 256), statistics)}, metrics=texts)


def test_data_vectors_adds_and_takes_the_scale_that_is_best_for_all():
    server = opened(protocol="data_vectors")
    give(server, update(server, "south", 1, 0.3))
    effects = give(server, update(server, "east", 1, 0.1))
    assert seen(effects)[1:] == [
        combined(2, 1), *model(server, "south", 1, 1, final=True), *model(server, "east", 1, 1, final=True),
    ]  # fmt: skip
    assert torch.allclose(values(effects, Kind.MODEL, "east"), server.published + 0.4)
    aucs = [0.5, 0.5, 0.5, 0.5, 0.9, *[0.5] * 6]
    assert server.on(scale_report("south", aucs, 0.3)) == []
    again = restored(server, pure_server(server.config))
    last = server.on(scale_report("east", aucs, 0.6))
    assert exact(again.on(scale_report("east", aucs, 0.6))) == exact(last)
    assert without_figures(last) == [line for scale in range(1, 12) for line in evaluated(scale, 2)]
    assert seen(last)[66:] == [ends(server, 4, best=5, judged=11)]
    assert server.outcome() == {"scale": 0.4}
    merged, pooled = values(last, Kind.FINISH, "south"), server.layout.statistics
    assert torch.allclose(merged[~pooled], (server.published + 0.4 * 0.4)[~pooled], atol=1e-6)
    assert torch.allclose(merged[pooled], torch.tensor(0.4))  # 24 of 36 samples are south's


def test_data_vectors_refuses_a_report_that_is_not_of_all_scales():
    server = opened(protocol="data_vectors")
    for site in SITES:
        give(server, update(server, site, 1, 0.1))
    assert refusal_of(server, scale_report("south", [0.5] * 10, 1.0)).number == 304
    assert refusal_of(server, scale_report("south", [0.5] * 11, -1.0)).number == 307
    refusal = refusal_of(server, scale_report("east", [2.0] * 11, 1.0))
    assert server.refused(scale_report("east", [0.5] * 11, 1.0).header, refusal) == []
    last = server.on(scale_report("south", [0.5] * 11, 1.0))
    assert len(without_figures(last)) == 44
    assert seen(last)[-1] == ends(server, 4, best=1, judged=11)
