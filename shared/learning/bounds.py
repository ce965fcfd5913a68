"""Bounds of what is learned from: no message may leave weights behind with which nobody can go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nightsplit.shared.errors import Refused

LARGEST_NORM = 1e15
"""Of a tensor of gradients, weights or predictions: squares and sums of its values are finite float32 numbers, and
so is what an optimizer makes of them."""


def is_bounded(*tensors: torch.Tensor) -> bool:
    """Return whether no tensor holds NaN, or has a norm beyond `LARGEST_NORM`; integers always are."""
    norms = [torch.linalg.vector_norm(tensor.detach()).float() for tensor in tensors if tensor.is_floating_point()]
    return not norms or bool((torch.stack(norms) <= LARGEST_NORM).all())  # one look at a GPU, not one per tensor


def check_bounded(what: str, *tensors: torch.Tensor) -> None:
    """Raise Refused 312 unless the values are `is_bounded`, before anything is learned from them."""
    if not is_bounded(*tensors):
        sentence = f"{what} of this batch are not finite, or beyond {LARGEST_NORM:g}."
        raise Refused(312, sentence, "lower optimizer.lr, or check the site's data.")


def check_step(module: nn.Module, *values: torch.Tensor) -> None:
    """Check all that a training step is made of: `values`, gradients, running statistics; Refused 312 for bad ones."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    check_bounded("loss, gradients or running statistics", *values, *gradients, *module.buffers())


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Give a module its buffers back, such as running statistics, when the batch that changed them is refused."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    except Refused:
        module.load_state_dict(before, strict=False)
        raise
