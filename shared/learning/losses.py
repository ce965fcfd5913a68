"""Loss functions by task."""

import torch
from torch.nn import functional

from nightsplit.shared.config.run import DataSection, TaskSection


def loss_of(task: TaskSection, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a batch.

    Args:
        outputs: (batch, task.outputs) float32: logits, or standardised predictions; (batch, 1, height, width)
            logits for segmentation.
        targets: (batch,) float32 0/1 (binary) or standardised values (regression), int64 (multiclass);
            (batch, height, width) float32 0/1 (segmentation).

    Returns:
        Scalar: binary cross entropy, cross entropy, mean squared error, or `segmentation_loss`.
    """
    if task.kind == "binary":
        return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets)
    if task.kind == "multiclass":
        return functional.cross_entropy(outputs, targets)
    if task.kind == "segmentation":
        return segmentation_loss(outputs.squeeze(1), targets)
    return functional.mse_loss(outputs.squeeze(1), targets)


def chance_loss(task: TaskSection, targets: torch.Tensor) -> float:
    """Return the mean loss of a model that knows nothing: logits of 0, or the target mean of run.toml."""
    if task.kind == "segmentation":
        return loss_of(task, torch.zeros_like(targets).unsqueeze(1), targets).item()
    return loss_of(task, torch.zeros(len(targets), task.outputs), targets).item()


def standardise(task: TaskSection, data: DataSection, targets: torch.Tensor) -> torch.Tensor:
    """Return (target - mean) / spread for regression, other targets unchanged."""
    return (targets - data.target_mean) / data.target_spread if task.kind == "regression" else targets


SMOOTH = 10.0
"""Pixels added to both sides of the Dice fraction: an empty prediction of an empty slice is right."""
FOREGROUND = 10.0
"""Weight of a foreground pixel in the cross entropy, since organs fill few of the pixels."""


def segmentation_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return soft Dice (Milletari et al., 3DV 2016, with p in place of p^2) plus cross entropy, mean over images.

    Both are per image, so that the loss of a batch is the mean of its records' losses.

    Args:
        logits, masks: (batch, height, width) float32, masks 0/1.
    """
    p = torch.sigmoid(logits)
    overlap, total = (p * masks).sum((1, 2)), (p + masks).sum((1, 2))
    dice = 1 - (2 * overlap + SMOOTH) / (total + SMOOTH)
    weight = logits.new_tensor(FOREGROUND)
    entropy = functional.binary_cross_entropy_with_logits(logits, masks, pos_weight=weight, reduction="none")
    return (dice + entropy.mean((1, 2))).mean()
