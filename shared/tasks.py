"""What a task asks a model to minimise."""

from __future__ import annotations

import torch
from torch.nn import functional

from shared.config import TaskSection


def loss_of(task: TaskSection, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        task: what is predicted.
        outputs: (batch, task.outputs) float32: logits, or standardised predictions.
        targets: (batch,) float32 0/1 (binary) or standardised values (regression), int64 (multiclass).

    Returns:
        Scalar: binary cross entropy, cross entropy, or mean squared error.
    """
    if task.kind == "binary":
        return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets)
    if task.kind == "multiclass":
        return functional.cross_entropy(outputs, targets)
    return functional.mse_loss(outputs.squeeze(1), targets)
