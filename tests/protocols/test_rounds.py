"""Rules by which rounds close, and what becomes of updates: late, hostile, cut short, or of a site that leaves."""

import dataclasses
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from nightsplit.shared.engine.order import CloseRound, Exclude
from nightsplit.shared.learning.bounds import capped
from nightsplit.shared.protocols.build import build_whole_model
from nightsplit.shared.wire.message import SERVER, Kind
from tests.harness.night import Night, tiny_rounds, tiny_splits

SITES = ("north", "south", "east")


def rest(night, names, turns=400):
    """Let some workers go on until nothing happens."""
    for _ in range(turns):
        for name in names:
            if name in night.engines:
                night.step(name)


def begun(config, folder, names=(SERVER, *SITES)):
    night = Night(config, folder)
    for name in names:
        night.start(name)
    return night


def lines(night, event):
    return [dict(line.metrics) for line in night.lines if line.metrics["event"] == event]


# -- who has reported --------------------------------------------------------------------------------


def test_a_round_waits_for_all_and_then_goes_on(tmp_path):
    night = begun(tiny_rounds(), tmp_path)
    rest(night, [SERVER, "north", "south"])
    assert night.roles[SERVER].version == 0
    assert night.roles[SERVER].awaited() == ["east"]
    rest(night, [SERVER, *SITES], turns=2000)
    assert night.roles[SERVER].version == 4
    assert night.over


def test_a_site_reports_days_late_and_counts_in_the_round_that_is_open(tmp_path):
    """Everybody goes and comes back; the late update, made of the first model, has a staleness and a smaller say."""
    config = tiny_rounds(order="fair", close="quorum", reports=2)
    night = begun(config, tmp_path, (SERVER, "north", "south"))
    night.start("east")
    rest(night, [SERVER, "east"], turns=2)  # its hello, no more
    rest(night, [SERVER, "north", "south"])
    assert night.roles[SERVER].version == 4, "two of three suffice"
    assert SERVER not in night.finished, "the third gets the final model when it reports"
    rest(night, [SERVER, *SITES], turns=2000)
    assert SERVER in night.finished
    stale = [line["staleness"] for line in lines(night, "train") if line["site"] == "east"]
    assert stale == [4]


def test_a_late_update_is_kept_for_the_next_round(tmp_path):
    night = begun(tiny_rounds(order="fair", close="quorum", reports=2, rounds=3), tmp_path)
    rest(night, [SERVER, "north", "south"], turns=1)
    while night.roles[SERVER].version < 1:
        rest(night, [SERVER, "north", "south"], turns=1)
    rest(night, ["east"], turns=200)
    rest(night, [SERVER], turns=5)
    assert night.roles[SERVER].version == 1
    before = night.roles[SERVER].vector
    rest(night, [SERVER, "north"], turns=300)
    assert night.roles[SERVER].version == 2, "east's late update and north's new one are a quorum"
    assert not torch.equal(night.roles[SERVER].vector, before)
    rest(night, [SERVER, *SITES], turns=2000)
    assert night.over


def test_a_deadline_closes_a_round_that_has_its_quorum(tmp_path):
    """The decision is in the journal: a server that is thrown away, and a replay, meet it at the same place."""
    config = tiny_rounds(order="fair", close="quorum", reports=2, deadline_hours=5.0, rounds=2)
    night = Night(config, tmp_path / "night")
    over = []
    night.decide = lambda: CloseRound() if over and night.roles[SERVER].may_close else None
    for name in night.workers:
        night.start(name)
    rest(night, [SERVER, "north", "south"])
    assert night.roles[SERVER].version == 0, "there is time until the deadline"
    assert night.roles[SERVER].may_close
    over.append(True)
    rest(night, [SERVER], turns=3)
    assert night.roles[SERVER].version == 1
    assert night.roles[SERVER].awaited() == ["north", "south", "east"]
    over.clear()
    night.restart(SERVER)
    rest(night, [SERVER], turns=10)
    assert night.roles[SERVER].version == 1
    over.append(True)
    rest(night, [SERVER, *SITES], turns=2000)
    assert SERVER in night.finished
    assert night.replayed(tmp_path / "replay").fingerprint() == night.fingerprint()


def test_buffered_rounds_answer_at_once(tmp_path):
    """FedBuff: a fast site is not held up by slow ones, and its updates count without them."""
    night = begun(tiny_rounds(order="fair", close="buffered", reports=2, rounds=4), tmp_path)
    rest(night, [SERVER, "north"], turns=2000)
    assert night.roles[SERVER].version == 4, "eight updates of one site are four buffers"
    rest(night, [SERVER, *SITES], turns=2000)
    assert night.over
    assert {line["site"] for line in lines(night, "train")} == set(SITES)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", [{"close": "quorum", "reports": 2}, {"close": "buffered", "reports": 3}])
def test_workers_die_under_every_rule(rule, seed, tmp_path):
    night = Night(tiny_rounds(order="fair", **rule), tmp_path / "shaken", prefetch=16).shaken(seed)
    assert night.replayed(tmp_path / "replay").fingerprint() == night.fingerprint()


def test_a_site_that_leaves_for_ever_is_not_waited_for(tmp_path):
    config = tiny_rounds(quorum=2)
    night = Night(config, tmp_path)
    gone = []
    night.decide = lambda: Exclude("east") if gone and "east" not in night.server.excluded else None
    for name in night.workers:
        night.start(name)
    while night.roles[SERVER].version < 2:
        rest(night, [SERVER, *SITES], turns=1)
    night.kill("east")
    gone.append(True)
    rest(night, [SERVER, "north", "south"], turns=2000)
    server = night.roles[SERVER]
    assert SERVER in night.finished
    assert server.version == 4
    assert set(server.excluded) == {"east"}
    assert server.evaluation.best > 0
    assert 0 < server.contribution("east")["batches"] < server.contribution("north")["batches"]


# -- what is combined --------------------------------------------------------------------------------


def test_a_round_is_the_weighted_mean_of_what_sites_would_reach_alone(tmp_path):
    """McMahan et al., algorithm 1, by hand: models that each site trains by itself, weighted by samples."""
    config = tiny_rounds(rounds=1, combine="mean")
    night = begun(config, tmp_path)
    first = night.roles[SERVER].vector
    updates = {}
    for site in SITES:
        role = night.roles[site]
        rest(night, [SERVER, site], turns=3)
        while role._last_update < 1:
            night.engines[site].step(0.0)
        updates[site] = role._updates[1]
    sizes = capped({site: len(tiny_splits(site).train) for site in SITES})
    mean = sum(sizes[site] * updates[site] for site in SITES) / sum(sizes.values())
    rest(night, [SERVER, *SITES], turns=2000)
    torch.testing.assert_close(night.roles[SERVER].vector, first + mean)


def test_running_statistics_are_those_of_the_pooled_samples():
    """Variances of sites with different means do not average to the variance of all their samples."""
    config = tiny_rounds()
    layout = build_whole_model(config, Path()).layout
    module = build_whole_model(config, Path()).module
    weights = dict(module.state_dict())
    vectors, samples = [], []
    for shift in (0.0, 4.0):
        values = torch.randn(400, 128, generator=torch.Generator().manual_seed(int(shift))) + shift
        samples.append(values)
        moments = {"1.running_mean": values.mean(0), "1.running_var": values.var(0, correction=0)}
        vectors.append(layout.vector({**weights, **moments}))
    pooled = layout.weights(sum(vectors) / 2)
    everything = torch.cat(samples)
    torch.testing.assert_close(pooled["1.running_mean"], everything.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled["1.running_var"], everything.var(0, correction=0), rtol=0, atol=1e-4)


def test_local_statistics_stay_at_the_site(tmp_path):
    config = tiny_rounds(statistics="local", rounds=2)
    assert not [name for name in build_whole_model(config, tmp_path).layout.shapes if "running" in name]
    night = Night(config, tmp_path).run()
    means = [night.roles[site].model()["model"]["1.running_mean"] for site in SITES]
    assert not torch.equal(means[0], means[1])
    weights = [night.roles[site].model()["model"]["0.weight"] for site in SITES]
    assert torch.equal(weights[0], weights[1])


def test_what_is_frozen_keeps_its_weights_and_does_not_travel(tmp_path):
    config = tiny_rounds(freeze=["0", "1"])
    made = build_whole_model(config, tmp_path)
    assert {name.split(".")[0] for name in made.layout.shapes} == {"4", "6"}
    night = Night(config, tmp_path).run()
    for site in SITES:
        trained = night.roles[site].trainer.weights()
        for name, weights in made.module.state_dict().items():
            assert torch.equal(trained[name], weights) is (name.split(".")[0] in ("0", "1")), name


@pytest.mark.parametrize("combine", ["geometric_median", "mean", "trimmed_mean", "median"])
def test_a_hostile_site_does_not_decide(combine, tmp_path):
    """attacks.md A17: one of three sends an update of the size of a bomb, and is named."""
    night = begun(tiny_rounds(rounds=1, combine=combine, trim=0.34), tmp_path)
    while night.roles["east"]._last_update < 1:
        rest(night, [SERVER, *SITES], turns=1)
    night.roles["east"]._updates[1] = torch.full_like(night.roles["east"]._updates[1], 1e6)
    rest(night, [SERVER, *SITES], turns=2000)
    assert night.over
    assert night.server.vector.abs().max() < 100
    assert {site: dict(parts) for site, parts in night.server.outliers.items() if parts} == {"east": {"update": 1}}


def test_values_that_no_sum_could_hold_are_refused(tmp_path):
    night = begun(tiny_rounds(rounds=2), tmp_path)
    while night.roles["east"]._last_update < 1:
        rest(night, [SERVER, *SITES], turns=1)
    night.roles["east"]._updates[1] = torch.full_like(night.roles["east"]._updates[1], 3e38)
    rest(night, [SERVER, *SITES], turns=3000)
    assert night.over
    assert night.roles[SERVER].refusals["east"] == night.roles[SERVER].layout.slices
    assert night.roles[SERVER].vector.isfinite().all()


def test_an_update_of_which_a_slice_cannot_be_read_does_not_count(tmp_path):
    night = begun(tiny_rounds(rounds=1), tmp_path)
    first = night.roles[SERVER].vector
    layout = night.roles[SERVER].layout
    while night.roles["east"]._last_update < 1:
        rest(night, [SERVER, *SITES], turns=1)
    night.roles["east"]._updates[1] = night.roles["east"]._updates[1][: layout.slice(layout.slices).stop - 7]
    while not all(night.roles[site]._last_update for site in SITES):
        rest(night, [SERVER, *SITES], turns=1)
    updates = {site: night.roles[site]._updates[1] for site in SITES}
    rest(night, [SERVER, *SITES], turns=2000)
    server = night.roles[SERVER]
    assert night.over
    assert server.refusals["east"] == 1
    assert night.broker.depth(night.queues["east"].dead) == 1
    sizes = {site: len(tiny_splits(site).train) for site in ("north", "south")}
    mean = sum(size * updates[site] for site, size in sizes.items()) / sum(sizes.values())
    torch.testing.assert_close(server.vector, first + mean)


def test_a_late_update_counts_whole_in_one_round(tmp_path):
    """A round closes between two slices of it: all of it is in the next one, and nothing in this one."""
    config = tiny_rounds(order="fair", close="quorum", reports=2, rounds=3)
    night = begun(config, tmp_path)
    server, allowed = night.roles[SERVER], set()
    choose = server.choose
    server.choose = lambda ready: choose(ready & allowed)
    while not all(night.roles[site]._last_update for site in SITES):
        rest(night, [SERVER, *SITES], turns=1)
    first, updates = server.vector, {site: night.roles[site]._updates[1] for site in SITES}
    allowed = {"east"}
    while not server.applied["east"]:
        rest(night, [SERVER, "east"], turns=1)
    assert server.applied["east"] < server.layout.slices
    allowed = {"north", "south"}
    while server.version < 1:
        rest(night, [SERVER, "north", "south"], turns=1)
    sizes = {site: len(tiny_splits(site).train) for site in SITES}
    on_time = sum(sizes[site] * updates[site] for site in allowed) / (sizes["north"] + sizes["south"])
    torch.testing.assert_close(server.vector, first + on_time)
    before = server.vector
    night.restart(SERVER)
    server = night.roles[SERVER]
    while server.version < 2:
        rest(night, [SERVER, "east", "north"], turns=1)
    stale = 2**-0.5 * updates["east"]
    new = night.roles["north"]._updates[2]
    late = (sizes["east"] * stale + sizes["north"] * new) / (sizes["east"] + sizes["north"])
    torch.testing.assert_close(server.vector, before + late)


@pytest.mark.parametrize("version", [1, 4])
def test_a_model_that_cannot_be_read_leaves_the_site_with_its_own(version, tmp_path):
    """Also the final one: the site, which cannot know that it is, ends with the run all the same."""
    night = begun(tiny_rounds(), tmp_path)
    server, answer = night.roles[SERVER], night.roles[SERVER]._answer

    def broken(site, seq):
        sends = answer(site, seq)
        if site == "east" and server.version == version:
            sends[-1] = dataclasses.replace(sends[-1], tensors={"values": sends[-1].tensors["values"][:-1]})
        return sends

    server._answer = broken
    rest(night, [SERVER, *SITES], turns=3000)
    assert night.over
    assert night.broker.depth(night.queues["east"].dead) >= 1
    best = night.roles[SERVER].best_weights
    assert all(torch.equal(night.roles["east"].model()["model"][name], best[name]) for name in best)


@pytest.mark.parametrize("kind", [Kind.REPORT, Kind.UPDATE])
def test_figures_that_are_none_are_refused(kind, tmp_path):
    night = begun(tiny_rounds(rounds=1), tmp_path)
    place = 2 if kind is Kind.REPORT else 1
    while place not in night.roles["east"]._metrics:
        rest(night, [SERVER, *SITES], turns=1)
    night.roles["east"]._metrics[place] = '{"test": {"auc": "high"}}'
    rest(night, [SERVER, *SITES], turns=2000)
    assert night.over
    assert night.roles[SERVER].refusals["east"] == 1


# -- judging, and the end ----------------------------------------------------------------------------


def test_the_best_model_is_what_everybody_gets(tmp_path):
    night = Night(tiny_rounds(rounds=5), tmp_path).run()
    server = night.roles[SERVER]
    assert [entry["epoch"] for entry in server.evaluation.history] == [1, 2, 3, 4, 5]
    assert 1 <= server.evaluation.best <= 5
    for site in SITES:
        model = night.roles[site].model()["model"]
        for name, weights in server.best_weights.items():
            torch.testing.assert_close(model[name], weights, msg=name)


def test_a_run_that_no_longer_improves_ends_early(tmp_path):
    config = tiny_rounds(rounds=30, patience=2)
    night = Night(replace(config, optimizer=replace(config.optimizer, lr=1e-9)), tmp_path).run()
    assert night.roles[SERVER].version < 10


def test_updates_in_one_slice_and_in_several_give_the_same_model(tmp_path):
    ends = []
    for number, size in enumerate((2**16, 2**20)):
        config = tiny_rounds(rounds=1)
        night = Night(replace(config, wire=replace(config.wire, message_bytes=size)), tmp_path / str(number)).run()
        ends.append(night.roles[SERVER].vector)
        assert night.roles[SERVER].layout.slices == (3 if number == 0 else 1)
    torch.testing.assert_close(*ends)  # norms are sums over slices, which round differently


def test_the_farewell_says_what_was_best(tmp_path):
    night = Night(tiny_rounds(rounds=2), tmp_path).run()
    best = night.roles[SERVER].evaluation
    assert {night.roles[site].best for site in SITES} == {best.best} != {0}
