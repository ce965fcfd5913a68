"""Bounds on the influence of each site's batches on the server's layers.

activations, targets    a batch's own size; an outlier is scaled down before the forward pass
gradients               a batch's own norm; an outlier is scaled down before the step
loss                    that of a site's latest batches; gradients of a site whose labels contradict those of the others
                        are scaled down, too
"""

import math
from collections.abc import Mapping

import torch

from nightsplit.shared.config.run import RunConfig, TaskSection
from nightsplit.shared.learning.bounds import Limit, LossBound, RunningBound, norm_of
from nightsplit.shared.learning.losses import chance_loss
from nightsplit.shared.storage.checkpoint import flatten, under


def scaled_parts(task: TaskSection) -> dict[str, str]:
    """Return the tensors of a message that are scaled, with their names in reports; classes are checked by number."""
    return {"smashed": "activations", **({"targets": "targets"} if task.kind == "regression" else {})}


class BatchBounds:
    """Bounds on activations, targets and gradients of training batches, each a `RunningBound`, and on their losses.

    The size of activations and targets is their root mean square. The first reference is 1, the size of standardised
    values, and the usual limit of a gradient's norm.
    """

    def __init__(self, config: RunConfig) -> None:
        self._task = config.task
        self._parts = scaled_parts(config.task)
        if config.run.learning == "targets":
            self._parts["displacement"] = "displacements"
        parts = [*self._parts.values(), "gradients"]
        self._bounds = {part: RunningBound(config.run.sites, first=1.0) for part in parts}
        self._losses = LossBound(config.run.sites)
        self._open: dict[str, tuple[float, float]] = {}
        """Norm and factor of each part of the batch that is being applied."""
        self._chance = 0.0
        """Loss by chance there."""

    def scale(self, site: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Begin a batch of a site: return the tensors of its message, outliers scaled down."""
        self._open = {}
        scaled = dict(tensors)
        for name, part in self._parts.items():
            if name in tensors:
                factor = self._factor(site, part, root_mean_square(tensors[name]))
                scaled[name] = tensors[name] * factor if factor < 1.0 else tensors[name]
        return scaled

    def expect(self, targets: torch.Tensor) -> None:
        """Note the targets (batch,) of the batch that a step is made with, before its loss is known."""
        self._chance = chance_loss(self._task, targets)

    def limit(self, site: str) -> Limit:
        """Return the limit of the gradients that a site's batch gives to the server's layers."""
        return lambda norm: self._factor(site, "gradients", norm) * self._losses.factor(site)

    def close(self, site: str, loss: float | None) -> dict[str, float]:
        """Remember an applied batch; return the factor of each part of it that was an outlier.

        The loss is None where the server does not know it.
        """
        batch, self._open = self._open, {}
        for part, (norm, _) in batch.items():
            self._bounds[part].remember(site, norm)
        factors = {part: factor for part, (_, factor) in batch.items()}
        if loss is not None:
            factors["loss"] = self._losses.factor(site)
            self._losses.remember(site, loss, self._chance)
        return {part: factor for part, factor in factors.items() if factor < 1.0}

    def _factor(self, site: str, part: str, norm: float) -> float:
        factor = self._bounds[part].factor(site, norm)
        self._open[part] = norm, factor
        return factor

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot; there is none within a batch."""
        states = [flatten(part, bound.state()) for part, bound in self._bounds.items()]
        states.append(flatten("loss", self._losses.state()))
        return {name: tensor for state in states for name, tensor in state.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        for part, bound in self._bounds.items():
            bound.restore(under(part, tensors))
        self._losses.restore(under("loss", tensors))


def root_mean_square(tensor: torch.Tensor) -> float:
    """Return the root mean square of a tensor's elements."""
    return norm_of([tensor]) / math.sqrt(max(1, tensor.numel()))
