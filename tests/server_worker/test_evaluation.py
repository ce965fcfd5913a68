"""The judge of epochs: when it judges, what it prefers, when it has seen enough."""

import pytest
import torch

from nightsplit.server_worker.evaluation import Evaluation
from nightsplit.shared.protocols.plan import Purpose
from tests.harness.night import tiny_config


def evaluation(**run):
    return Evaluation(tiny_config(("north", "south"), **run))


def report(judge, epoch, loss, auc=None):
    figures = {"validation": {"samples": 4.0, "loss": loss, "auc": auc}, "test": {"samples": 4.0, "loss": 9.0 - loss}}
    return [judge.report(site, epoch, figures) for site in ("north", "south")]


def test_an_epoch_is_judged_when_every_site_has_reported():
    judge = evaluation()
    assert report(judge, 1, 0.5) == [False, True]
    assert (judge.best, judge.evaluated) == (1, 1)


def test_the_best_validation_auc_wins_whatever_loss_and_test_say():
    judge = evaluation()
    for epoch, (loss, auc) in enumerate(((0.3, 0.7), (0.9, 0.8), (0.2, 0.75)), 1):
        report(judge, epoch, loss, auc)
    assert judge.best == 2


def test_where_auc_is_undefined_the_loss_decides():
    judge = evaluation()
    for epoch, loss in enumerate((0.7, 0.4, 0.5), 1):
        report(judge, epoch, loss)
    assert judge.best == 2
    assert judge.entry(2)["overall"]["validation"]["loss"] == pytest.approx(0.4)


def test_patience_counts_evaluations_without_improvement():
    judge = evaluation(patience=2)
    for epoch, loss in enumerate((0.4, 0.5, 0.6), 1):
        assert not judge.exhausted
        report(judge, epoch, loss)
    assert judge.exhausted


def test_without_patience_it_never_stops():
    judge = evaluation()
    for epoch in range(1, 20):
        report(judge, epoch, float(epoch))
    assert not judge.exhausted


def test_without_validation_patients_the_last_epoch_stands():
    judge = evaluation()
    for epoch in (1, 2):
        for site in ("north", "south"):
            judge.report(site, epoch, {"test": {"samples": 2.0, "loss": 1.0}})
    assert judge.best == 2


def test_a_half_collected_block_survives_a_restore():
    judge, again = evaluation(), evaluation()
    outputs, targets = torch.randn(6, 1), torch.tensor([0.0, 1, 0, 1, 0, 1])
    judge.add("north", Purpose.TEST, outputs[:3], targets[:3])
    judge.report("south", 1, {})
    again.restore(judge.tensors(), judge.facts())
    again.add("north", Purpose.TEST, outputs[3:], targets[3:])
    assert again.close("north", 1)
    assert again.history[0]["sites"]["north"]["test"]["samples"] == 6


def test_a_candidate_of_which_nothing_was_reported_does_not_replace_one_with_figures():
    judge = evaluation()
    report(judge, 1, 0.5, 0.8)
    for site in ("north", "south"):
        judge.report(site, 2, {})
    assert (judge.best, judge.evaluated) == (1, 2)
