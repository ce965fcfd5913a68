"""Displacements of activations: a loss's request to layers that learn of it a night later.

A late gradient is a direction without a length. A displacement D of activations h has both, since its length follows
from the curvature of the loss and not from a learning rate (a majorise-minimise step):

    l(o(h + d)) <= l + <G, d> + L |d|^2 / 2    with L = kappa |J|^2, G = dl/dh, J = do/dh
    D = -reach s G,   s = sum_i |G_i|^2 / sum_i L_i |G_i|^2

`kappa` bounds the eigenvalues of the loss's Hessian in the outputs o, and |J|^2, the sum of squares, those of J^T J. So
with layers that are linear in h, reach 1 minimises the bound summed over the block, and any reach below 2 lowers its
loss. The step is one number for a whole block of samples: a displacement tells no more than the gradient and that
number. With squared loss and one output, reach 1 is the Gauss-Newton target. With layers that are not linear the
inequality is an approximation; docs/explanation/nights.md says what was measured.

Layers learn from a displacement in several passes over the stored block: they fit h + D (LocoProp: Amid, Anil and
Warmuth, AISTATS 2022, arXiv 2106.06199). The bound needs the error along D_i alone, u_i = D_i / |D_i|; a small share
`across` of the rest keeps what the gradient does not see near where it was:

    mean_i 1/2 [ (u_i . e_i)^2 + across |e_i|^2 ],   e_i = layers(x_i) - (h_i + D_i)
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.func import functional_call

from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.seeds import Seed, seeded

HEAD_REACH = {"binary": 0.5, "multiclass": 0.5, "regression": 1.0}
"""Reach of the displacement of a head's input, by task."""
CUT_REACH = {"binary": 0.25, "multiclass": 0.25, "regression": 0.5}
"""Reach at the cut, where the layers behind it are fitted to the same labels in the same night."""
ACROSS = 0.05
"""Weight of errors across a displacement, where errors along it have weight 1."""

_CURVATURE = {"binary": 0.25, "multiclass": 0.5, "regression": 2.0}
"""Largest eigenvalue of the Hessian of one sample's loss in its outputs: p (1 - p); that of diag(p) - p p^T, which is
at most 1/2; and 2 for a squared error."""
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Sums:
    """Two sums over a block, the quotient of which is a step; 0 if the second is 0."""

    numerator: float = 0.0
    denominator: float = 0.0

    def __add__(self, other: Self) -> "Sums":
        return Sums(self.numerator + other.numerator, self.denominator + other.denominator)

    @property
    def step(self) -> float:
        """Quotient of the sums."""
        return self.numerator / self.denominator if self.denominator > _TINY else 0.0


def gradients(task: TaskSection, module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the gradient (batch, ...) of each sample's own loss at the inputs (batch, ...), in evaluation mode.

    Targets as for `loss_of`; all on the module's device.
    """
    module.eval()
    inputs = inputs.detach().requires_grad_()
    loss = loss_of(task, module(inputs), targets) * len(inputs)
    (gradient,) = torch.autograd.grad(loss, inputs)
    return gradient


def head_sums(task: TaskSection, module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Sums:
    """Return the sums of a batch for the step s of its block; arguments as of `gradients`."""
    squares = gradients(task, module, inputs, targets).flatten(1).square().sum(1)
    inputs = inputs.detach().requires_grad_()
    outputs = module(inputs)
    jacobian = torch.zeros_like(squares)
    for column in outputs.flatten(1).unbind(1):
        (of_column,) = torch.autograd.grad(column.sum(), inputs, retain_graph=True)
        jacobian += of_column.flatten(1).square().sum(1)
    curved = _CURVATURE[task.kind] * (jacobian * squares).sum().item()
    return Sums(squares.sum().item(), curved)


def along(error: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Return the part of each sample's error (batch, ...) in the direction of its displacement (batch, ...)."""
    direction = nn.functional.normalize(displacement.flatten(1), dim=1)
    flat = (error.flatten(1) * direction).sum(1, keepdim=True) * direction
    return flat.view_as(error)


def fit_loss(error: torch.Tensor, displacement: torch.Tensor, across: float) -> torch.Tensor:
    """Return the mean over samples of the loss above, for errors (batch, ...) of layers that are fitted."""
    part = along(error, displacement).flatten(1).square().sum(1)
    return ((part + across * error.flatten(1).square().sum(1)) / 2).mean()


def direction(
    module: nn.Module, inputs: torch.Tensor, aims: torch.Tensor, displacement: torch.Tensor, seed: Seed
) -> tuple[torch.Tensor, Sums]:
    """Return the direction v (batch, ...) of the displacement of a fitted module's inputs, and the sums of its length.

    It is the step of steepest descent for what the module still lacks, with the length of an exact line search in the
    linearised module:

        r_i = along(h_i + D_i - module(x_i), D_i),   v_i = J_i^T r_i,   Dx_i = a v_i,   a = sum <J v, r> / sum |J v|^2

    Args:
        inputs: x, (batch, ...) float32 on the module's device.
        aims: h + D, (batch, ...).
        displacement: D, (batch, ...).
        seed: of dropout.
    """
    inputs = inputs.detach().requires_grad_()
    weights = {name: tensor.detach() for name, tensor in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train()
    with seeded(seed, inputs.device):
        outputs = functional_call(module, {**weights, **buffers}, inputs)
    lacking = along(aims - outputs.detach(), displacement)
    # J v is the derivative of J^T u in u, in the direction v.
    pulled = lacking.clone().requires_grad_()
    (at_inputs,) = torch.autograd.grad(outputs, inputs, pulled, create_graph=True)
    (pushed,) = torch.autograd.grad(at_inputs, pulled, at_inputs.detach())
    return at_inputs.detach(), Sums((pushed * lacking).sum().item(), pushed.square().sum().item())
