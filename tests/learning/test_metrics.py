"""Figures of merit, and what is done where one is undefined."""

import pytest
import torch

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.learning.metrics import FIGURES, measure, overall, typical

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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", FIGURES)
def test_outputs_that_are_not_finite_leave_every_figure_undefined(kind, value):
    size = (2, 2) if kind == "segmentation" else ()
    outputs = torch.zeros(6, 3 if kind == "multiclass" else 1, *size)
    outputs[2] = value
    targets = torch.tensor([0, 1, 2, 0, 1, 2]) if kind == "multiclass" else torch.zeros(6, *size)
    metrics = measure(TaskSection(kind=kind, classes=3), DATA, outputs, targets, [str(n) for n in range(6)])
    assert metrics == {**dict.fromkeys(metrics), "samples": 6.0}
    assert set(metrics) == set(FIGURES[kind].__struct_fields__)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("binary", [0.5, 1.0]), ("binary", [1e30, 0.0]), ("binary", [-1.0, 1.0]), ("binary", [float("nan"), 1.0]),
        ("multiclass", [3, 0]), ("multiclass", [-100, 1]), ("regression", [float("inf"), 0.0]),
    ],
)  # fmt: skip
def test_targets_that_the_task_has_not_leave_every_figure_undefined(kind, values):
    outputs = torch.zeros(2, 3 if kind == "multiclass" else 1)
    metrics = measure(TaskSection(kind=kind, classes=3), DATA, outputs, torch.tensor(values))
    assert metrics == {**dict.fromkeys(metrics), "samples": 2.0}


def test_figures_beyond_all_bounds_are_undefined():
    """Outputs are finite, what is computed of them is not."""
    outputs, targets = torch.tensor([[3e38], [-3e38], [1.0]]), torch.tensor([0.0, 1.0, 0.0])
    assert measure(TaskSection(kind="regression"), DATA, outputs, targets) == {
        "samples": 3.0, "loss": None, "mae": None, "r2": None,
    }  # fmt: skip
    assert measure(TaskSection(kind="binary"), DATA, outputs, targets)["loss"] is None


def test_no_site_chooses_the_best_model_by_figures_that_it_made_up():
    honest = [{"samples": 10.0, "loss": 0.2, "mae": mae, "r2": None} for mae in (3.0, 5.0)]
    liar = {"samples": 1e9, "loss": 1e30, "mae": 1e30, "r2": 1.0}
    assert overall([*honest, liar])["mae"] > 1e29
    assert typical([*honest, liar])["mae"] == 5.0
    assert typical([*honest, liar])["r2"] == 1.0, "one of them has it"
    assert typical(honest) == overall(honest), "two have no majority"
