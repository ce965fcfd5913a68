"""Figures of merit, and what is done where one is undefined."""

import pytest
import torch

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.learning.metrics import measure, overall

DATA = DataSection(features=["a"], target_mean=100.0, target_spread=10.0)


def test_binary_figures():
    outputs, targets = torch.tensor([[2.0], [1.0], [-1.0], [-2.0]]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    metrics = measure(TaskSection(kind="binary"), DATA, outputs, targets)
    assert metrics["auc"] == pytest.approx(0.75)
    assert metrics["balanced_accuracy"] == pytest.approx(0.5)
    assert metrics["samples"] == 4


def test_a_single_class_has_no_auc():
    metrics = measure(TaskSection(kind="binary"), DATA, torch.randn(3, 1), torch.ones(3))
    assert metrics["auc"] is None
    assert metrics["loss"] is not None


def test_multiclass_figures():
    outputs, targets = 9 * torch.eye(3), torch.arange(3)
    metrics = measure(TaskSection(kind="multiclass", classes=3), DATA, outputs, targets)
    assert metrics["auc"] == metrics["balanced_accuracy"] == 1.0


def test_regression_is_reported_in_its_own_unit():
    outputs, targets = torch.tensor([[0.0], [1.0]]), torch.tensor([0.5, 1.0])
    metrics = measure(TaskSection(kind="regression"), DATA, outputs, targets)
    assert metrics["mae"] == pytest.approx(2.5)
    assert metrics["loss"] == pytest.approx(0.125)


def test_overall_weighs_by_samples_and_leaves_out_what_is_undefined():
    sites = [{"samples": 10.0, "loss": 1.0, "auc": 0.8}, {"samples": 30.0, "loss": 2.0, "auc": None}]
    assert overall(sites) == {"samples": 40.0, "loss": 1.75, "auc": 0.8}
    assert overall([{"samples": 2.0, "auc": None}])["auc"] is None
