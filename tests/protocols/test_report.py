"""What a site says of its held-out samples: one spelling, fixed names, ranges, and no more samples than it has."""

import json

import pytest
import torch

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.metrics import FIGURES, measure
from nightsplit.shared.protocols.data_vectors import SCALES, decode_reports, encode_reports
from nightsplit.shared.protocols.report import decode_report, encode_report

ANNOUNCED = {"train": 20, "validation": 8, "test": 6}
TASKS = {kind: TaskSection(kind=kind, classes=3) for kind in FIGURES}
GOOD = {
    "binary": {"samples": 6.0, "loss": 0.5, "auc": None, "balanced_accuracy": 0.75},
    "multiclass": {"samples": 6.0, "loss": 0.0, "auc": 1.0, "balanced_accuracy": 0.1},
    "regression": {"samples": 6.0, "loss": 2.5, "mae": 17.25, "r2": -4.0},
    "segmentation": {"samples": 6.0, "loss": 1e-9, "dice": 0.3},
}


def read(kind, text):
    return decode_report(text, TASKS[kind], ANNOUNCED, "night/north/server/report/9")


@pytest.mark.parametrize("kind", FIGURES)
def test_a_report_comes_back_as_it_was_and_has_one_spelling(kind):
    figures = {"validation": GOOD[kind], "test": GOOD[kind]}
    text = encode_report(TASKS[kind], figures)
    assert text == json.dumps(figures, sort_keys=True)
    assert read(kind, text) == figures
    assert read(kind, "{}") == {}


@pytest.mark.parametrize("kind", FIGURES)
def test_what_is_measured_can_be_reported(kind):
    size = (4, 4) if kind == "segmentation" else ()
    outputs = torch.randn(6, 3) if kind == "multiclass" else torch.randn(6, 1, *size)
    targets = torch.tensor([0, 1, 2, 0, 1, 2]) if kind == "multiclass" else torch.randint(0, 2, (6, *size)).float()
    metrics = measure(TASKS[kind], DataSection(features=["a"]), outputs, targets, [str(n) for n in range(6)])
    assert read(kind, encode_report(TASKS[kind], {"test": metrics})) == {"test": metrics}


WRONG = {
    "no samples": {"samples": ...},
    "infinitely many": {"samples": float("inf")},
    "more than there are": {"samples": 7.0},
    "half a sample": {"samples": 5.5},
    "below 0": {"samples": -1.0},
    "none": {"samples": None},
    "a figure too many": {"step": 1e300},
    "a figure by the name of a fact": {"event": 1.0},
    "markup": {"<img src=x>|\n# sha256": 1.0},
    "three thousand": {f"figure{n}": 1.0 for n in range(3000)},
    "a figure too few": {"loss": ...},
    "a negative loss": {"loss": -0.1},
    "a loss beyond all bounds": {"loss": 1e300},
    "a loss in words": {"loss": "low"},
    "a bool": {"loss": True},
    "not a number": {"loss": float("nan")},
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("kind", FIGURES)
def test_figures_that_no_such_site_has_are_refused(kind, case):
    figures = {name: value for name, value in {**GOOD[kind], **WRONG[case]}.items() if value is not ...}
    with pytest.raises(Refused, match="night/north/server/report/9 has no figures of 8 validation, 6 test samples"):
        read(kind, json.dumps({"test": figures}))


@pytest.mark.parametrize(
    ("kind", "figure", "value"),
    [
        ("binary", "auc", 1.01), ("binary", "balanced_accuracy", -0.01), ("multiclass", "auc", 7.0),
        ("regression", "mae", -1.0), ("regression", "r2", 1.5), ("regression", "r2", -1e300),
        ("segmentation", "dice", 1.5), ("binary", "mae", 1.0), ("regression", "auc", 0.5),
    ],
)  # fmt: skip
def test_every_figure_has_its_range(kind, figure, value):
    with pytest.raises(Refused):
        read(kind, json.dumps({"test": {**GOOD[kind], figure: value}}))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"{}"', '{"train": {}}', '{"test": 1}', '{"test": {}}', "\ud800", "9" * 5000,
        "[" * 100_000, '{"test":' * 100_000, " " * 1999 + "{}", json.dumps({"test": GOOD["binary"]}) + "x",
    ],
)  # fmt: skip
def test_text_that_is_no_report_is_refused(text):
    with pytest.raises(Refused) as refused:
        read("binary", text)
    assert refused.value.number == 304


def test_there_is_a_report_for_each_scale():
    texts = [encode_report(TASKS["binary"], {"test": GOOD["binary"]})] * len(SCALES)
    assert decode_reports(encode_reports(texts), "it") == texts


@pytest.mark.parametrize("text", ["{}", "[]", "[1]", json.dumps(["{}"] * 10), json.dumps(["{}"] * 12), "[" * 100_000])
def test_another_number_of_reports_is_refused(text):
    with pytest.raises(Refused, match="it has no figures for 11 scales"):
        decode_reports(text, "it")
