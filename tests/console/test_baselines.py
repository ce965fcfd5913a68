"""Baselines: the uncut model, trained as a run trains its halves."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from nightsplit.console.demo.baselines import alone, centralized
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.build import build_whole_model
from nightsplit.shared.protocols.rounds import Work
from nightsplit.simulation.evaluate import ModelFigures, evaluate
from nightsplit.simulation.run import simulate
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.rounds.batches import RoundBatches
from nightsplit.site_worker.rounds.trainer import Trainer
from tests.harness.night import tiny_config, tiny_rounds, tiny_splits

SITES = ("north", "south")


def splits() -> dict[str, Splits]:
    return {site: tiny_splits(site) for site in SITES}


def config(**run: object) -> RunConfig:
    return tiny_config(SITES, dropout=0.0, codec="fp32", epochs=4, **run)


def test_a_synchronous_run_of_one_site_is_the_baseline_wherever_it_is_cut() -> None:
    one = tiny_config(("north",), dropout=0.0, codec="fp32", epochs=4, window=1, protocol="split_u")
    own = {"north": tiny_splits("north")}
    cut, baseline = simulate(one, own).evaluate(), alone(one, "north", own)
    assert cut.pooled == pytest.approx(baseline.pooled, abs=1e-5)
    assert cut.sites["north"] == cut.pooled


@pytest.mark.parametrize("settings", [{"decay": "cosine"}, {"local_batches": 2}])
def test_rounds_of_one_site_are_training_it_alone(settings: dict[str, object]) -> None:
    one = tiny_rounds(("north",), protocol="fedavg_transfer", evaluate_every=4, **settings)
    own = {"north": tiny_splits("north")}
    trainer, batches = (
        Trainer(build_whole_model(one, Path()).module, one, "cpu"),
        RoundBatches(one, "north", own["north"], one.run.seed),
    )
    for k in range(one.round.rounds * Work.of(one, len(batches.train)).batches):
        trainer.step(*batches.batch(k), batches.seed("trainer", k), batches.progress(k))
    by_itself = evaluate(one, own, lambda site, inputs: trainer.predict(inputs))
    # Weights that travel as differences, and variances as second moments, are rounded on the way.
    assert alone(one, "north", own).pooled == pytest.approx(by_itself.pooled, abs=1e-3)


def test_a_private_run_is_compared_with_training_without_noise() -> None:
    private, own = tiny_rounds(("north",), protocol="fedavg_dp_seg", rounds=2), {"north": tiny_splits("north")}
    assert private.privacy is not None
    plain = replace(private, privacy=None, run=replace(private.run, protocol="fedavg_transfer"))
    assert alone(private, "north", own) == alone(plain, "north", own)


def test_pooled_data_teach_more_than_chance_and_every_site_is_judged() -> None:
    figures = centralized(config(), splits())
    assert set(figures.sites) == set(SITES)
    assert figures.pooled["samples"] == sum(len(part.test) for part in splits().values())
    assert figures.pooled["auc"] is not None
    assert figures.pooled["auc"] > 0.6


def test_a_site_alone_is_judged_on_the_others_patients_and_learns_from_its_own() -> None:
    figures = alone(config(), "north", splits())
    assert set(figures.sites) == set(SITES)
    changed = splits() | {"south": replace_training(splits()["south"])}
    assert alone(config(), "north", changed) == figures
    assert centralized(config(), changed) != centralized(config(), splits())


def replace_training(own: Splits) -> Splits:
    return Splits(own.validation, own.validation, own.test)


def test_an_uncut_model_has_no_window_no_protocol_and_no_averaging() -> None:
    plain = alone(config(), "north", splits())
    for other in (config(window=1), config(protocol="split_frozen"), config(bottoms="averaged")):
        assert alone(other, "north", splits()) == plain


def test_the_best_epoch_counts_and_patience_ends_the_training() -> None:
    def overfitted(epochs: int, patience: int = 0) -> ModelFigures:
        wild = config()
        run = replace(wild.run, epochs=epochs, patience=patience)
        return alone(replace(wild, run=run, optimizer=replace(wild.optimizer, lr=0.5)), "north", splits())

    by_epochs = [overfitted(epochs) for epochs in range(1, 9)]
    repeated = [before == after for before, after in pairwise(by_epochs)]
    assert True in repeated  # an epoch that was no better changed nothing
    assert False in repeated
    assert overfitted(epochs=60, patience=2) in by_epochs


def test_pooled_figures_are_those_of_all_patients_as_one_group() -> None:
    def predict(site: str, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[:, :1] + (5.0 if site == "north" else 0.0)

    figures = evaluate(config(), splits(), predict)
    assert figures.overall["auc"] != figures.pooled["auc"]
    loss = sum((m["loss"] or 0) * (m["samples"] or 0) for m in figures.sites.values())
    assert figures.pooled["loss"] == pytest.approx(loss / (figures.pooled["samples"] or 0))
