"""Bounds on training: no message may leave weights that make further training impossible."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nightsplit.shared.errors import Refused

NORM_MAX = 1e15
"""Largest norm of a tensor of gradients, weights or predictions: squares and sums of its values, and an optimizer's
steps with them, are finite float32 numbers."""


def is_bounded(*tensors: torch.Tensor) -> bool:
    """Return whether no tensor holds NaN or has a norm beyond `NORM_MAX`; always True for integers."""
    norms = [torch.linalg.vector_norm(tensor.detach()).float() for tensor in tensors if tensor.is_floating_point()]
    return not norms or bool((torch.stack(norms) <= NORM_MAX).all())  # one wait for a GPU, not one per tensor


def check_bounded(what: str, *tensors: torch.Tensor) -> None:
    """Raise Refused 312 unless the tensors are bounded, before any training with them."""
    if not is_bounded(*tensors):
        sentence = f"{what} of this batch are not finite, or beyond {NORM_MAX:g}."
        raise Refused(312, sentence, "lower optimizer.lr, or check the site's data.")


def check_step(module: nn.Module, *values: torch.Tensor) -> None:
    """Check all values of a training step: `values`, gradients, running statistics; Refused 312 for bad ones."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    check_bounded("loss, gradients or running statistics", *values, *gradients, *module.buffers())


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Restore a module's buffers, such as running statistics, if the body raises Refused."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    except Refused:
        module.load_state_dict(before, strict=False)
        raise
