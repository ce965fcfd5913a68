"""Optimizers, and module and optimizer state as flat tensors for snapshots."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from nightsplit.shared.config.run import OptimizerSection


def make_optimizer(section: OptimizerSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that run.toml asks for; without parameters (a bottom of pooling) one that does nothing."""
    parameters = list(parameters) or [nn.Parameter(torch.zeros(0))]
    if section.name == "sgd":
        return torch.optim.SGD(parameters, lr=section.lr, weight_decay=section.weight_decay, momentum=section.momentum)
    kind = torch.optim.Adam if section.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=section.lr, weight_decay=section.weight_decay)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's memory: "<parameter number>/<name>" to tensor."""
    return {
        f"{number}/{name}": value
        for number, memory in optimizer.state_dict()["state"].items()
        for name, value in memory.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        state.setdefault(int(number), {})[name] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
