"""Training of a stage, consecutive layers of a model, on data that arrives with messages."""

import torch
from torch import nn

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.learning.bounds import Limit, buffers_kept, check_bounded, check_step, unlimited
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import PartOptimizer, Progress
from nightsplit.shared.learning.seeds import Seed, seeded


class Stage:
    """Layers of a model with their optimizer; moved to `device`, while arguments and results are on the CPU."""

    def __init__(self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, device: str) -> None:
        self.module = module.to(device)
        self.optimizer = PartOptimizer(optimizer, module.parameters())
        self._task = task
        self._device = device

    def train_step(
        self, activations: torch.Tensor, targets: torch.Tensor, seed: Seed, progress: Progress,
        limit: Limit = unlimited,
    ) -> tuple[float, torch.Tensor]:  # fmt: skip
        """Perform one training step; return the mean loss, and its gradient (batch, ...) at the input.

        Args:
            activations: (batch, ...) float32.
            targets: as for `loss_of`.
            seed: seed of dropout in this step.
            progress: of the layers' training.
            limit: limit on the gradients of the layers.

        Raises:
            Refused: 312 loss or gradients are not finite; nothing was changed.
        """
        inputs = activations.to(self._device, copy=True).requires_grad_()
        self.module.train()
        with buffers_kept(self.module):
            with seeded(seed, self._device):
                loss = loss_of(self._task, self.module(inputs), targets.to(self._device))
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            assert inputs.grad is not None
            check_step(self.module, loss, inputs.grad)
        self.optimizer.step(progress, limit)
        return loss.item(), inputs.grad.cpu()

    def predict(self, activations: torch.Tensor) -> torch.Tensor:
        """Return outputs (batch, outputs) in evaluation mode for activations (batch, ...); Refused 312 not finite."""
        self.module.eval()
        with torch.no_grad():
            outputs: torch.Tensor = self.module(activations.to(self._device))
        check_bounded("outputs", outputs)
        return outputs.cpu()
