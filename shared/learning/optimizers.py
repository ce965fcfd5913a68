"""Optimizers of a model's parts: update rule, learning rate over a run, clipping, and state for snapshots.

    learning rate of a step    lr * min(1, (step + 1) / warmup) * (1 + cos(pi * done / planned)) / 2
    gradients of a step        g * min(1, clip_norm / |g|), |g| over all weights of the part

The factor with the cosine is 1 if `schedule` is "constant". Goyal et al., arXiv 1706.02677 (warm-up); Loshchilov and
Hutter, arXiv 1608.03983 (cosine).
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.learning.bounds import Limit, limit_gradients, unlimited


class Progress(NamedTuple):
    """Progress of a part's training before a step.

    Attributes:
        step: steps that the part has taken.
        done: training batches of the data's owner that came before this step's.
        planned: training batches that it has in the whole run.
    """

    step: int
    done: int
    planned: int


START = Progress(0, 0, 1)
"""Progress of a training that begins."""


def rate_at(section: OptimizerSection, progress: Progress) -> float:
    """Return the factor of the learning rate of a step."""
    rate = min(1.0, (progress.step + 1) / section.warmup) if section.warmup else 1.0
    if section.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * progress.done / progress.planned))
    return rate


class PartOptimizer:
    """Optimizer of one part of the model, or of a whole one; without parameters (a bottom of pooling) it does nothing.

    "muon" is Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) for weights W of two
    dimensions and more, and AdamW for all others: biases, and weights of normalization. A convolution's weights
    (o, i, k, k) are the matrix (o, i k^2). With the gradient G:

        M <- 0.95 M + 0.05 G                                     momentum
        U  = NS5(0.05 G + 0.95 M)                                Nesterov's; nearest matrix with equal singular values
        W <- W - lr weight_decay W - lr sqrt(max(1, o / (i k^2))) U

    NS5 is five Newton-Schulz steps X <- a X + (b A + c A^2) X with A = X X^T, in bfloat16 and from X / |X|, where
    (a, b, c) = (3.4445, -4.7750, 2.0315) bring the singular values to about 1 (0.7 to 1.2). The update is scaled as by
    its authors ("original" in torch): a step changes W by about `lr` times an orthogonal matrix.
    """

    def __init__(self, section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> None:
        self._section = section
        self._parameters = list(parameters) or [nn.Parameter(torch.zeros(0))]
        self._held = [_as_matrix(p) if section.name == "muon" and p.ndim > 2 else p for p in self._parameters]
        """The parameters as torch's optimizers hold them: a copy of weights that must become a matrix."""
        self._optimizers = _torch_optimizers(section, self._held)

    def zero_grad(self) -> None:
        """Remove all gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self, progress: Progress, limit: Limit = unlimited) -> None:
        """Change the weights by their gradients, which are scaled down by `limit` and to `clip_norm` before."""
        if limit is not unlimited or self._section.clip_norm is not None:
            limit_gradients(self._parameters, lambda norm: min(limit(norm), self._clipping(norm)))
        rate = self._section.lr * rate_at(self._section, progress)
        copies = [(p, held) for p, held in zip(self._parameters, self._held, strict=True) if p is not held]
        with torch.no_grad():
            for parameter, held in copies:
                held.copy_(parameter.reshape(held.shape))
                held.grad = None if parameter.grad is None else parameter.grad.reshape(held.shape)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        with torch.no_grad():
            for parameter, held in copies:
                parameter.copy_(held.view(parameter.shape))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot: "<number of the parameter>/<name>" to tensor."""
        numbers: dict[torch.Tensor, int] = {held: number for number, held in enumerate(self._held)}
        return {
            f"{numbers[held]}/{name}": value
            for optimizer in self._optimizers
            for held, state in optimizer.state.items()
            for name, value in state.items()
            if value is not None
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        numbers = {held: number for number, held in enumerate(self._held)}
        for optimizer in self._optimizers:
            state: dict[int, dict[str, torch.Tensor]] = {}
            for index, held in enumerate(optimizer.param_groups[0]["params"]):
                prefix = f"{numbers[held]}/"
                own = {key.removeprefix(prefix): tensors[key].clone() for key in tensors if key.startswith(prefix)}
                if own:
                    state[index] = own
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})

    def _clipping(self, norm: float) -> float:
        clip_norm = self._section.clip_norm
        return 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm


def _as_matrix(parameter: nn.Parameter) -> nn.Parameter:
    """Return a copy of weights (o, ...) as a matrix (o, rest)."""
    return nn.Parameter(parameter.detach().clone().reshape(len(parameter), -1))


def _torch_optimizers(section: OptimizerSection, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    lr, decay, betas = section.lr, section.weight_decay, section.betas
    if section.name == "sgd":
        return [torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=section.momentum)]
    if section.name == "adam":
        return [torch.optim.Adam(parameters, lr=lr, weight_decay=decay, betas=betas)]
    if section.name == "adamw":
        return [torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, betas=betas)]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    others = [parameter for parameter in parameters if parameter.ndim != 2]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="original"))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr, weight_decay=decay, betas=betas))
    return optimizers
