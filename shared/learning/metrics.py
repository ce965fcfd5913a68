"""The figures by which a model is judged on held-out patients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from nightsplit.shared.config.run import DataSection, TaskSection
from nightsplit.shared.learning.losses import loss_of

Metrics = dict[str, float | None]
"""`samples`, `loss`, and the task's figures; None where one is undefined (AUC of a single class)."""

HEADLINE: Mapping[str, str] = {
    "binary": "auc",
    "multiclass": "balanced_accuracy",
    "regression": "mae",
    "segmentation": "dice",
}
"""The figure that reports lead with, by kind of task."""


def standing(task: TaskSection, metrics: Metrics) -> tuple[float, float]:
    """How good a model is, for comparisons: by the headline figure, then by the loss. Larger is better.

    The loss alone would stop too early: a network goes on to rank patients better while it grows
    overconfident. A figure that is undefined counts as the worst.
    """
    headline, loss = metrics.get(HEADLINE[task.kind]), metrics.get("loss")
    sign = -1.0 if task.kind == "regression" else 1.0
    return (-math.inf if headline is None else sign * headline, -math.inf if loss is None else -loss)


def measure(
    task: TaskSection,
    data: DataSection,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    patients: Sequence[str] = (),
) -> Metrics:
    """Judge predictions on held-out samples.

    Args:
        task, data: what was predicted, and in which unit.
        outputs, targets: as in `loss_of`; regression is judged in the target's own unit.
        patients: whom each sample belongs to; used by segmentation, whose Dice is that of a patient's volume.
    """
    # Half of a worker's start would go into this import, and nothing is judged before an epoch is over.
    from sklearn.metrics import balanced_accuracy_score, mean_absolute_error, r2_score, roc_auc_score

    if len(outputs) == 0:
        return {"samples": 0.0, "loss": None}
    metrics: Metrics = {"samples": float(len(outputs)), "loss": loss_of(task, outputs, targets).item()}
    truth = targets.numpy()
    if task.kind == "segmentation":
        metrics["dice"] = _dice(outputs.squeeze(1) > 0, targets > 0.5, patients)
        return metrics
    if task.kind == "regression":
        predicted = outputs.squeeze(1).numpy() * data.target_spread + data.target_mean
        truth = truth * data.target_spread + data.target_mean
        metrics["mae"] = float(mean_absolute_error(truth, predicted))
        metrics["r2"] = float(r2_score(truth, predicted)) if len(truth) > 1 else None
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


def _dice(predicted: torch.Tensor, truth: torch.Tensor, patients: Sequence[str]) -> float:
    """Mean over patients of 2 |A and B| / (|A| + |B|) over all their slices; 1 where both are empty."""
    names, of_patient = np.unique(np.asarray(patients), return_inverse=True)
    index = torch.from_numpy(of_patient)
    both, either = (
        torch.zeros(len(names)).index_add_(0, index, pixels.flatten(1).sum(1).float())
        for pixels in (predicted & truth, predicted.int() + truth.int())
    )
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
