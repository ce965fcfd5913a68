"""Optimizers, and their state as flat tensors for snapshots."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from nightsplit.shared.config.run import OptimizerSection


def make_optimizer(section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer of run.toml; without parameters (a bottom of pooling) it does nothing."""
    parameters = list(parameters) or [nn.Parameter(torch.zeros(0))]
    if section.name == "sgd":
        return torch.optim.SGD(parameters, lr=section.lr, weight_decay=section.weight_decay, momentum=section.momentum)
    kind = torch.optim.Adam if section.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=section.lr, weight_decay=section.weight_decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state: "<parameter number>/<name>" to tensor."""
    return {
        f"{number}/{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the result of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
