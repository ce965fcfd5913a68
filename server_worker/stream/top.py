"""Server's layers, which are trained on smashed data and return the gradient at the cut."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from nightsplit.server_worker.stream.activation_store import ActivationStore, Row
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.learning.bounds import Limit, buffers_kept, check_bounded, check_step
from nightsplit.shared.learning.displacement import ACROSS, Sums, direction, fit_loss, gradients, head_sums
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.learning.seeds import seeded
from nightsplit.shared.learning.stage import Stage
from nightsplit.shared.storage.checkpoint import flatten, under


class Top(Stage):
    """Layers behind the cut, with their optimizer."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return CPU copies of parameters and buffers."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.module.state_dict().items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return copies of the buffers, which a forward may change."""
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}

    def gradients(self, smashed: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the gradient (batch, *cut) of each sample's own loss at the cut, in evaluation mode."""
        return gradients(self._task, self.module, smashed.to(self._device), targets.to(self._device)).cpu()

    def head_sums(self, smashed: torch.Tensor, targets: torch.Tensor) -> Sums:
        """Return the sums of a batch for the step of its block's displacements."""
        return head_sums(self._task, self.module, smashed.to(self._device), targets.to(self._device))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a snapshot."""
        return {**flatten("top", self.module.state_dict()), **flatten("optimizer", self.optimizer.state())}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self.module.load_state_dict(under("top", tensors))
        self.optimizer.restore(under("optimizer", tensors))


class StoredTop(Top):
    """Top that is trained on a store of released activations; other arguments as of `Top`."""

    def __init__(
        self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, device: str, store: ActivationStore
    ) -> None:
        super().__init__(module, optimizer, task, device)
        self.store = store

    def train_stored(self, rows: Sequence[Row], seed: int, progress: Progress) -> float:
        """Perform one training step on stored rows and return the mean loss; raises as `train_step`."""
        return self.train_step(*self.store.gather(rows), seed, progress)[0]


class FittedMiddle(Top):
    """Server's layers between bottom and head in a run that learns by targets."""

    def forward(self, smashed: torch.Tensor, seed: int) -> torch.Tensor:
        """Return activations (batch, *head) of a training batch (batch, *cut); Refused 312: not finite, no change."""
        self.module.train()
        weights = {**dict(self.module.named_parameters()), **self.buffers()}
        with torch.no_grad(), seeded(seed, self._device):
            outputs: torch.Tensor = functional_call(self.module, weights, smashed.to(self._device))
        check_bounded("activations", outputs)
        return outputs.cpu()

    def fit_step(self, batch: Mapping[str, torch.Tensor], seed: int, progress: Progress, limit: Limit) -> float:
        """Perform a step towards the displaced activations of a stored batch, and return its loss.

        Args:
            batch: `smashed` (batch, *cut), and `activations` and `displacement`, both (batch, *head).
            seed: of dropout, as in `forward`.
            progress: of the layers' training.
            limit: limit on their gradients.

        Raises:
            Refused: 312 loss or gradients are not finite; nothing was changed.
        """
        smashed, aims, displacement = self._place(batch)
        self.module.train()
        with buffers_kept(self.module):
            with seeded(seed, self._device):
                outputs = self.module(smashed)
            loss = fit_loss(outputs - aims, displacement, ACROSS)
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            check_step(self.module, loss)
        self.optimizer.step(progress, limit)
        return loss.item()

    def direction(self, batch: Mapping[str, torch.Tensor], seed: int) -> tuple[torch.Tensor, Sums]:
        """Return the direction (batch, *cut) of a batch's displacement at the cut, and the sums of its length."""
        return direction(self.module, *self._place(batch), seed)

    def _place(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        smashed, activations, displacement = (
            batch[name].to(self._device) for name in ("smashed", "activations", "displacement")
        )
        return smashed, activations + displacement, displacement


class Middle(Top):
    """Server's layers between the site's bottom and the site's head (split_u).

    The gradient at the head arrives later than the forward pass that it belongs to, and other batches
    may have changed the weights in between. So the weights of that pass are kept (weight stashing:
    Harlap et al., PipeDream, SOSP 2019, section 3.3), the pass is recomputed with them, and the
    resulting gradient is applied to the current weights.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, device: str) -> None:
        super().__init__(module, optimizer, task, device)
        self._steps = 0
        self._stash: dict[int, dict[str, torch.Tensor]] = {}
        """Parameters by version, the number of steps, as used by open forward passes."""

    def forward(self, smashed: torch.Tensor, seed: int, training: bool) -> tuple[torch.Tensor, int]:
        """Return activations (batch, *head) and the version of their weights; Refused 312: not finite, no change."""
        if not training:
            return self.predict(smashed), self._steps
        parameters = self._stash.get(self._steps) or {
            name: parameter.detach().clone() for name, parameter in self.module.named_parameters()
        }
        self.module.train()
        with torch.no_grad(), seeded(seed, self._device):
            # Buffers are copied: only the recomputation may update running statistics.
            weights = {**parameters, **self.buffers()}
            outputs: torch.Tensor = functional_call(self.module, weights, smashed.to(self._device))
        check_bounded("activations", outputs)
        self._stash[self._steps] = parameters
        return outputs.cpu(), self._steps

    def backward(
        self, smashed: torch.Tensor, gradient: torch.Tensor, version: int, seed: int, progress: Progress, limit: Limit
    ) -> torch.Tensor:
        """Apply the gradient (batch, *head) at the head's input; return the gradient at the cut (batch, *cut).

        `version` is the one that `forward` returned; other arguments as of `train_step`. Refused 312 if gradients are
        not finite; then nothing was changed.
        """
        inputs = smashed.to(self._device, copy=True).requires_grad_()
        stashed = self._stash[version]
        parameters = {name: stashed[name].clone().requires_grad_() for name, _ in self.module.named_parameters()}
        buffers = self.buffers()
        self.module.train()
        with seeded(seed, self._device):
            outputs = functional_call(self.module, {**parameters, **buffers}, inputs)
        at_cut, *at_parameters = torch.autograd.grad(outputs, [inputs, *parameters.values()], gradient.to(self._device))
        check_bounded("gradients", at_cut, *at_parameters, *buffers.values())
        self.module.load_state_dict(buffers, strict=False)
        for parameter, parameter_gradient in zip(self.module.parameters(), at_parameters, strict=True):
            parameter.grad = parameter_gradient
        self.optimizer.step(progress, limit)
        self._steps += 1
        return at_cut.cpu()

    def forget(self, needed: set[int]) -> None:
        """Drop the stashed weights of all versions that are not needed."""
        self._stash = {version: weights for version, weights in self._stash.items() if version in needed}

    @override
    def state(self) -> dict[str, torch.Tensor]:
        entries = {**super().state(), "steps": torch.tensor(self._steps)}
        for version, weights in self._stash.items():
            entries |= flatten(f"stash/{version}", weights)
        return entries

    @override
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().restore(tensors)
        self._steps = int(tensors["steps"])
        self._stash = {}
        for key, tensor in under("stash", tensors).items():
            version, _, name = key.partition("/")
            self._stash.setdefault(int(version), {})[name] = tensor.to(self._device)
