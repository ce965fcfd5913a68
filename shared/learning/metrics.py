"""Metrics of a model on held-out patients."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta, Struct

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.learning.bounds import MAJORITY
from nightsplit.shared.learning.losses import loss_of

FIGURE_MAX = 1e30
"""Largest figure that counts as defined, so that weighted means over sites stay finite."""

Count = Annotated[float, Meta(ge=0, multiple_of=1)]
Share = Annotated[float, Meta(ge=0, le=1)] | None
Size = Annotated[float, Meta(ge=0, le=FIGURE_MAX)] | None


class Figures(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Figures of one part of the data; None where one is undefined (AUC of a single class)."""

    samples: Count
    loss: Size


class ClassFigures(Figures, frozen=True, kw_only=True):
    """Figures of a classifier."""

    auc: Share
    balanced_accuracy: Share


class ValueFigures(Figures, frozen=True, kw_only=True):
    """Figures of a regression, `mae` in the target's own unit."""

    mae: Size
    r2: Annotated[float, Meta(ge=-FIGURE_MAX, le=1)] | None


class MaskFigures(Figures, frozen=True, kw_only=True):
    """Figures of a segmentation."""

    dice: Share


FIGURES: Mapping[str, type[Figures]] = {
    "binary": ClassFigures,
    "multiclass": ClassFigures,
    "regression": ValueFigures,
    "segmentation": MaskFigures,
}
"""Figures by kind of task."""

Metrics = dict[str, float | None]
"""`Figures` as plain data."""

HEADLINE: Mapping[str, str] = {
    "binary": "auc",
    "multiclass": "balanced_accuracy",
    "regression": "mae",
    "segmentation": "dice",
}
"""Main figure of a report, by kind of task."""


def score(task: TaskSection, metrics: Metrics) -> tuple[float, float]:
    """Return a score that compares models: the headline figure, then the negative loss. Larger is better.

    The loss alone would stop training too early: the ranking of patients still improves while a network
    grows overconfident. An undefined figure counts as the worst.
    """
    headline, loss = metrics.get(HEADLINE[task.kind]), metrics.get("loss")
    sign = -1.0 if task.kind == "regression" else 1.0
    return (-math.inf if headline is None else sign * headline, -math.inf if loss is None else -loss)


def measure(
    task: TaskSection, data: DataSection, outputs: torch.Tensor, targets: torch.Tensor, patients: Sequence[str] = ()
) -> Metrics:
    """Return the metrics of predictions on held-out samples.

    All but `samples` are None if outputs are not finite or targets are invalid; so is a figure that is undefined.

    Args:
        task, data: the task, and the unit of its targets.
        outputs, targets: as in `loss_of`; regression is measured in the target's own unit.
        patients: patient of each sample; used by segmentation, which measures Dice per patient's volume.
    """
    # Imported late, since it takes half of a worker's start and no model is evaluated before an epoch is over.
    from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, r2_score, roc_auc_score

    metrics: Metrics = dict.fromkeys(FIGURES[task.kind].__struct_fields__)
    metrics["samples"] = float(len(outputs))
    if len(outputs) == 0 or not outputs.isfinite().all() or not _are_targets(task, targets):
        return metrics
    metrics["loss"] = _defined(max(loss_of(task, outputs, targets).item(), 0.0))
    truth = targets.numpy()
    if task.kind == "segmentation":
        metrics["dice"] = _dice(outputs.squeeze(1) > 0, targets > 0.5, patients)
        return metrics
    if task.kind == "regression":
        with np.errstate(over="ignore", invalid="ignore"):
            predicted = outputs.squeeze(1).numpy() * data.target_spread + data.target_mean
            truth = truth * data.target_spread + data.target_mean
            if np.isfinite(predicted).all() and np.isfinite(truth).all():
                metrics["mae"] = _defined(float(mean_absolute_error(truth, predicted)))
                metrics["r2"] = _defined(float(r2_score(truth, predicted))) if len(truth) > 1 else None
        return metrics
    if len(np.unique(truth)) < (2 if task.kind == "binary" else task.classes):
        return metrics
    if task.kind == "binary":
        scores = torch.sigmoid(outputs.squeeze(1)).numpy()
        predicted = (scores > 0.5).astype(truth.dtype)
    else:
        scores = torch.softmax(outputs, 1).numpy()
        predicted = scores.argmax(1)
    metrics["auc"] = float(roc_auc_score(truth, scores, multi_class="ovr"))
    metrics["balanced_accuracy"] = float(balanced_accuracy_score(truth, predicted))
    return metrics


def _are_targets(task: TaskSection, targets: torch.Tensor) -> bool:
    """Return whether all targets are classes of the task, or finite values."""
    if task.kind in ("regression", "segmentation"):
        return bool(targets.isfinite().all())
    classes = 2 if task.kind == "binary" else task.classes
    return bool(((targets >= 0) & (targets < classes) & (targets % 1 == 0)).all())


def _defined(figure: float) -> float | None:
    return figure if abs(figure) <= FIGURE_MAX else None


def _dice(predicted: torch.Tensor, truth: torch.Tensor, patients: Sequence[str]) -> float:
    """Return the mean over patients of 2 |A and B| / (|A| + |B|) over all their slices; 1 if both are empty."""
    names, of_patient = np.unique(np.asarray(patients), return_inverse=True)

    def per_patient(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(names)).index_add_(0, torch.from_numpy(of_patient), pixels.flatten(1).sum(1).float())

    overlap, total = per_patient(predicted & truth), per_patient(predicted.int() + truth.int())
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0).mean().item()


def typical(sites: Sequence[Metrics]) -> Metrics:
    """Return the median of each figure over sites that have it, and `overall` where they are too few for a majority.

    It chooses the best model: no site can, with figures or numbers of samples that it made up.
    """
    result = overall(sites)
    for name in result.keys() - {"samples"}:
        figures = [value for metrics in sites if (value := metrics.get(name)) is not None]
        if len(figures) >= MAJORITY:
            result[name] = statistics.median(figures)
    return result


def overall(sites: Sequence[Metrics]) -> Metrics:
    """Return the mean over sites weighted by samples; each figure skips sites where it is undefined."""
    names = dict.fromkeys(name for metrics in sites for name in metrics if name != "samples")
    result: Metrics = {"samples": sum(metrics["samples"] or 0.0 for metrics in sites)}
    for name in names:
        figures = [(m["samples"] or 0.0, value) for m in sites if (value := m.get(name)) is not None]
        total = sum(samples for samples, _ in figures)
        result[name] = sum(samples * value for samples, value in figures) / total if total else None
    return result
