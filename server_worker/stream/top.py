"""Server's layers, which are trained on smashed data and return the gradient at the cut."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from nightsplit.server_worker.stream.activation_store import ActivationStore, Row
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import TaskSection
from nightsplit.shared.learning.bounds import Limit, check_bounded
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.learning.seeds import seeded
from nightsplit.shared.learning.stage import Stage
from nightsplit.shared.storage.checkpoint import flatten, under


class Top(Stage):
    """Layers behind the cut, with their optimizer."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Return CPU copies of parameters and buffers."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.module.state_dict().items()}

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
            weights = {**parameters, **self._buffers()}
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
        buffers = self._buffers()
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

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in self.module.named_buffers()}
