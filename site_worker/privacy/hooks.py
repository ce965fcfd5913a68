"""Opacus' hooks for gradients of single records, with a faster rule for convolutions.

Opacus copies the input of a convolution once for every element of the kernel (unfold), and then multiplies. Here
the input is copied once for every column of the kernel: a shift by a row is a slice of that copy.
"""

from typing import Any, ClassVar

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import nn
from torch.nn import functional

Gradients = dict[torch.Tensor, torch.Tensor]
"""Gradients (batch, *shape) of single records, by trainable parameter."""


def conv_grad_sample(layer: nn.Conv2d, activations: list[torch.Tensor], backprops: torch.Tensor) -> Gradients:
    """Compute gradients from the input [(batch, channels, h, w)] and the gradient at the output (batch, o, h', w')."""
    if layer.groups > 1 or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return dict(compute_conv_grad_sample(layer, activations, backprops))
    return _gradients(layer, _kernel(layer, activations[0], backprops), backprops)


def conv_transpose_grad_sample(
    layer: nn.ConvTranspose2d, activations: list[torch.Tensor], backprops: torch.Tensor
) -> Gradients:
    """Compute gradients as `conv_grad_sample`, with input and output exchanged."""
    return _gradients(layer, _kernel(layer, backprops, activations[0]), backprops)


def _kernel(layer: nn.Conv2d | nn.ConvTranspose2d, wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """Return (batch, o, c, *kernel): `wide` (batch, c, h, w) under the kernel, times `narrow` (batch, o, h', w')."""
    batch, outputs, height, width = narrow.shape
    rows, columns = layer.kernel_size
    vertical, horizontal = (int(side) for side in layer.padding)
    padded = functional.pad(wide, (horizontal, horizontal, vertical, vertical))

    def positions(element: int, side: int, length: int) -> slice:
        """Return the positions of `padded` along a side that an element of the kernel meets, `length` of them."""
        first, stride = element * layer.dilation[side], layer.stride[side]
        return slice(first, first + stride * (length - 1) + 1, stride)

    # (batch, c, columns, height of `padded`, w')
    shifted = torch.stack([padded[..., positions(column, 1, width)] for column in range(columns)], dim=2)
    flat = narrow.reshape(batch, outputs, -1)
    parts = []
    for row in range(rows):
        slices = shifted[..., positions(row, 0, height), :].reshape(batch, -1, height * width)
        parts.append(torch.bmm(flat, slices.transpose(1, 2)).view(batch, outputs, -1, columns))
    return torch.stack(parts, dim=3)


def _gradients(layer: nn.Conv2d | nn.ConvTranspose2d, kernel: torch.Tensor, backprops: torch.Tensor) -> Gradients:
    gradients = {layer.weight: kernel} if layer.weight.requires_grad else {}
    if layer.bias is not None and layer.bias.requires_grad:
        gradients[layer.bias] = backprops.flatten(2).sum(dim=2)
    return gradients


def has_rule(module: nn.Module) -> bool:
    """Return whether gradients of single records can be computed for a layer."""
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):  # Opacus has rules for its own versions of them
        return False
    return not (isinstance(module, nn.ConvTranspose2d) and module.groups > 1)


class PerSampleModule(GradSampleModule):  # type: ignore[misc]  # Opacus has no type hints
    """Module that stores `grad_sample`, (batch, *shape), in each parameter in the backward of a sum of losses."""

    GRAD_SAMPLERS: ClassVar[dict[type[nn.Module], Any]] = {
        **GradSampleModule.GRAD_SAMPLERS, nn.Conv2d: conv_grad_sample, nn.ConvTranspose2d: conv_transpose_grad_sample,
    }  # fmt: skip

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, loss_reduction="sum")
