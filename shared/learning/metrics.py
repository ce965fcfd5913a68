"""The figures by which a model is judged on held-out patients."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta, Struct

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.learning.losses import loss_of

LARGEST_FIGURE = 1e30
"""Beyond it a figure counts as undefined: weighted means over sites stay finite."""

Count = Annotated[float, Meta(ge=0, multiple_of=1)]
Share = Annotated[float, Meta(ge=0, le=1)] | None
Size = Annotated[float, Meta(ge=0, le=LARGEST_FIGURE)] | None


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
    r2: Annotated[float, Meta(ge=-LARGEST_FIGURE, le=1)] | None


class MaskFigures(Figures, frozen=True, kw_only=True):
    """Figures of a segmentation."""

    dice: Share


FIGURES: Mapping[str, type[Figures]] = {
    "binary": ClassFigures,
    "multiclass": ClassFigures,
    "regression": ValueFigures,
    "segmentation": MaskFigures,
}
"""By kind of task."""

Metrics = dict[str, float | None]
"""`Figures` as plain data."""

HEADLINE: Mapping[str, str] = {
    "binary": "auc",
    "multiclass": "balanced_accuracy",
    "regression": "mae",
    "segmentation": "dice",
}
"""The figure that reports lead with, by kind of task."""


def score(task: TaskSection, metrics: Metrics) -> tuple[float, float]:
    """How good a model is, for comparisons: by the headline figure, then by the loss. Larger is better.

    The loss alone would stop too early: a network goes on to rank patients better while it grows
    overconfident. A figure that is undefined counts as the worst.
    """
    headline, loss = metrics.get(HEADLINE[task.kind]), metrics.get("loss")
    sign = -1.0 if task.kind == "regression" else 1.0
    return (-math.inf if headline is None else sign * headline, -math.inf if loss is None else -loss)


def measure(
    task: TaskSection, data: DataSection, outputs: torch.Tensor, targets: torch.Tensor, patients: Sequence[str] = ()
) -> Metrics:
    """Evaluate predictions on held-out samples.

    A figure that outputs which are not finite, or targets of no class, leave undefined is None.

    Args:
        task, data: what was predicted, and in which unit.
        outputs, targets: as in `loss_of`; regression is judged in the target's own unit.
        patients: whom each sample belongs to; used by segmentation, whose Dice is that of a patient's volume.
    """
    # Half of a worker's start would go into this import, and nothing is judged before an epoch is over.
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
    several = len(np.unique(truth)) == (2 if task.kind == "binary" else task.classes)
    if task.kind == "binary":
        scores = torch.sigmoid(outputs.squeeze(1)).numpy()
        chosen = (scores > 0.5).astype(truth.dtype)
    else:
        scores = torch.softmax(outputs, 1).numpy()
        chosen = scores.argmax(1)
    metrics["auc"] = float(roc_auc_score(truth, scores, multi_class="ovr")) if several else None
    metrics["balanced_accuracy"] = float(balanced_accuracy_score(truth, chosen)) if several else None
    return metrics


def _are_targets(task: TaskSection, targets: torch.Tensor) -> bool:
    """Whether each is a class of the task, or a finite value."""
    if task.kind in ("regression", "segmentation"):
        return bool(targets.isfinite().all())
    classes = 2 if task.kind == "binary" else task.classes
    return bool(((targets >= 0) & (targets < classes) & (targets % 1 == 0)).all())


def _defined(figure: float) -> float | None:
    return figure if abs(figure) <= LARGEST_FIGURE else None


def _dice(predicted: torch.Tensor, truth: torch.Tensor, patients: Sequence[str]) -> float:
    """Mean over patients of 2 |A and B| / (|A| + |B|) over all their slices; 1 where both are empty."""
    names, of_patient = np.unique(np.asarray(patients), return_inverse=True)
    index = torch.from_numpy(of_patient)
    counted = (pixels.flatten(1).sum(1).float() for pixels in (predicted & truth, predicted.int() + truth.int()))
    both, either = (torch.zeros(len(names)).index_add_(0, index, pixels) for pixels in counted)
    return torch.where(either > 0, 2 * both / either.clamp(min=1), 1.0).mean().item()


def overall(sites: Sequence[Metrics]) -> Metrics:
    """Mean over sites weighted by samples; a figure that is undefined at a site leaves that site out."""
    names = dict.fromkeys(name for metrics in sites for name in metrics if name != "samples")
    result: Metrics = {"samples": sum(metrics["samples"] or 0.0 for metrics in sites)}
    for name in names:
        known = [(m["samples"] or 0.0, value) for m in sites if (value := m.get(name)) is not None]
        total = sum(samples for samples, _ in known)
        result[name] = sum(samples * value for samples, value in known) / total if total else None
    return result
