"""A site that leaves for ever: the run ends, every restart and replay makes the same decision, and people are told."""

from datetime import datetime

import pytest
from msgspec.structs import replace

from nightsplit.console.status import _sentence
from nightsplit.server_worker.report import write_report
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.run_store.base import Status
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.wire.message import SERVER
from tests.harness.night import SYSTEMS, each_system
from tests.harness.ward import Ward, replace_run, ward_config

MOMENTS = {
    "split_labels": (0, 1, 3, 5, 9), "split_u": (0, 3, 6, 13, 19), "split_frozen": (0, 1, 4),
    "fedavg_transfer": (1, 3, 12), "fedavg_dp_seg": (0, 2), "data_vectors": (0, 3),
}  # fmt: skip
"""After how many of its messages the site goes: before its first, before an averaging, in the second epoch, at last;
between two slices of an update, behind one."""


@pytest.mark.parametrize(
    ("system", "sent"), [(system, sent) for system in SYSTEMS for sent in MOMENTS[system.protocol]]
)
def test_a_strict_run_ends_without_a_site_whatever_dies(system, sent, calm, tmp_path):
    config = ward_config(**system._asdict())
    undisturbed = calm(config, {"south": sent})
    assert list(undisturbed.server.excluded) == ["south"]
    assert [entry for entry in undisturbed.journal() if entry.startswith("-")] == ["-south"]
    assert undisturbed.server.applied["south"] == sent, "what it gave before stays"
    assert undisturbed.server.done
    shaken = Ward(config, tmp_path / "shaken", {"south": sent}).shaken(seed=sent)
    assert shaken.outcome() == undisturbed.outcome()
    assert shaken.replayed(tmp_path / "replay").outcome() == undisturbed.outcome()


@pytest.mark.parametrize("seed", range(2))
@each_system
def test_a_fair_run_ends_like_the_replay_of_its_journal(system, seed, tmp_path):
    config = ward_config(**system._asdict(), order="fair")
    shaken = Ward(config, tmp_path / "shaken", {"south": 3}).shaken(seed)
    assert list(shaken.server.excluded) == ["south"]
    assert shaken.replayed(tmp_path / "replay").outcome() == shaken.outcome()


def test_two_sites_may_go_one_after_the_other(tmp_path):
    config = ward_config(quorum=1)
    ward = Ward(config, tmp_path / "calm", {"south": 3, "east": 5}).run()
    assert sorted(ward.server.excluded) == ["east", "south"]
    assert Ward(config, tmp_path / "shaken", {"south": 3, "east": 5}).shaken(1).outcome() == ward.outcome()


def test_a_site_that_has_given_everything_may_go(tmp_path):
    """Frozen: it releases its activations and is never seen again. That is its contract, and no absence."""
    config = ward_config("split_frozen")
    ward = Ward(config, tmp_path, {"south": 5})  # 3 batches to train on, one to choose by, one to test
    assert ward.run().server.excluded == {}
    assert ward.server.applied["south"] == ward.server.sequences["south"].last == 5


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_a_frozen_run_trains_on_what_was_stored(order, tmp_path):
    ward = Ward(ward_config("split_frozen", order=order), tmp_path, {"south": 2}).run()
    rows = sum(len(ward.server.sequences["south"].plan.item(q).rows) for q in (1, 2))
    assert ward.server.samples["south"] == rows > 0
    assert ward.server.share("south") == rows / (rows + 40 + 12)
    assert all(set(entry["sites"]) == {"north", "east"} for entry in ward.server.evaluation.history)
    assert len(ward.server.evaluation.history) == ward.config.run.epochs


@pytest.mark.parametrize("order", ["strict", "fair"])
def test_epochs_are_judged_without_it(order, tmp_path):
    """Its figures stay in the epoch that it finished, and are absent later."""
    config = replace_run(ward_config(order=order), epochs=4)
    plan_of_one_epoch = 3 + 1 + 1  # batches of south: training, validation, test
    ward = Ward(config, tmp_path, {"south": plan_of_one_epoch + 1}).run()
    judged = {entry["epoch"]: set(entry["sites"]) for entry in ward.server.evaluation.history}
    everybody = {"north", "south", "east"}
    assert judged == {1: everybody, **dict.fromkeys((2, 3, 4), everybody - {"south"})}


def test_the_best_weights_is_the_one_that_was_evaluated(tmp_path):
    """In fair order others run ahead; an epoch that is judged late must not get the weights of today."""
    config = replace_run(ward_config(order="fair"), epochs=6)
    ward = Ward(config, tmp_path, {"south": 2})
    kept = {}
    while not ward.over:
        for name in (SERVER, "north", "east", "south"):
            ward.turn(name, 3)
            for epoch, top in ward.server._tops.items():
                kept[epoch] = top
    best = ward.server.evaluation.best
    assert set(kept) == {1, 2, 3, 4, 5, 6}, "all epochs waited for the site"
    assert best < 6, "choose other data: the last epoch cannot show the difference"
    assert all(ward.server.best_weights[name].equal(tensor) for name, tensor in kept[best].items())
    assert not all(ward.server.best_weights[name].equal(tensor) for name, tensor in kept[6].items())


# -- what people are told ---------------------------------------------------------------------------------


def test_the_report_names_everybodys_part(tmp_path):
    ward = Ward(ward_config(), tmp_path / "night", {"south": 8}).run()
    report = write_report(tmp_path / "report", ward.config, ward.server, ward.silence.last_seen)
    sites, plan = report["sites"], ward.server.sequences["south"].plan
    trained = [q for q in range(1, 9) if plan.item(q).purpose is Purpose.TRAIN]
    assert sites["south"]["batches"] == len(trained)
    assert sites["south"]["samples"] == sum(len(plan.item(q).rows) for q in trained)
    assert sum(facts["batches"] for facts in sites.values()) == report["steps"]
    assert sum(facts["share"] for facts in sites.values()) == pytest.approx(1)
    assert sites["south"]["excluded_at"] == ward.journal().index("-south")
    assert sites["north"]["excluded_at"] is None
    assert datetime.fromisoformat(sites["south"]["last_seen"]).utcoffset().total_seconds() == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"**EXCLUDED: south, after {sites['south']['excluded_at']} applied messages" in text
    assert "silent for 0.2 h and 2 sites suffice" in text
    assert text.count("EXCLUDED") == 2  # the sentence, and its line in the table


def test_a_crash_does_not_change_what_a_site_gave(tmp_path):
    config = ward_config("split_u")
    calm = Ward(config, tmp_path / "calm", {"south": 8}).run()
    shaken = Ward(config, tmp_path / "shaken", {"south": 8}).shaken(3)
    given = [[ward.server.contribution(site) for site in config.run.sites] for ward in (calm, shaken)]
    assert given[0] == given[1]


def test_status_says_for_whom_the_run_waits():
    report = WorkerStatus(phase=Phase.WORKING, applied=5, lacking=("south", "east"))
    assert _sentence(Status(SERVER, report, 1.0), 0).endswith(
        "; WAITING for south, east: silent for too long, but the run cannot meet its quorum without them"
    )
    assert "WAITS" not in _sentence(Status(SERVER, replace(report, lacking=()), 1.0), 0)
