"""The server's layers: they learn from smashed data, and give back the gradient at the cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.func import functional_call

from nightsplit.server_worker.stream.activation_store import ActivationStore, Row
from nightsplit.shared.config.run import OptimizerSection, TaskSection
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.losses import loss_of
from nightsplit.shared.learning.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from nightsplit.shared.learning.seeds import seeded
from nightsplit.shared.storage.checkpoint import flatten, under
from nightsplit.shared.wire.codecs import is_finite


class Top:
    """The layers behind the cut, with their optimizer.

    Args:
        module: the layers; moved to `device`.
        optimizer: as in run.toml.
        task: gives the loss.
        device: where it computes. Tensors go in and come out on the CPU.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, device: str) -> None:
        self.module = module.to(device)
        self._optimizer = make_optimizer(optimizer, module.parameters())
        self._task = task
        self._device = device

    def learn(self, smashed: torch.Tensor, targets: torch.Tensor, seed: int) -> tuple[float, torch.Tensor]:
        """One training step.

        Args:
            smashed: (batch, *cut) float32.
            targets: (batch,).
            seed: of dropout in this step.

        Returns:
            The mean loss, and its gradient (batch, *cut) float32 at the cut.

        Raises:
            Refused: 312 the loss is not finite; nothing was changed.
        """
        inputs = smashed.to(self._device, copy=True).requires_grad_()
        self.module.train()
        before = buffers_of(self.module)
        with seeded(seed, self._device):
            loss = loss_of(self._task, self.module(inputs), targets.to(self._device))
        refuse_unless_finite(loss, self.module, before)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        assert inputs.grad is not None
        return loss.item(), inputs.grad.cpu()

    def predict(self, smashed: torch.Tensor) -> torch.Tensor:
        """Outputs (batch, outputs) for smashed data (batch, *cut), in evaluation mode."""
        self.module.eval()
        with torch.no_grad():
            outputs: torch.Tensor = self.module(smashed.to(self._device))
        return outputs.cpu()

    def weights(self) -> dict[str, torch.Tensor]:
        """CPU copies of parameters and buffers."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.module.state_dict().items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Entries for a snapshot."""
        return dict(
            [*flatten("top", self.module.state_dict()), *flatten("optimizer", optimizer_tensors(self._optimizer))]
        )

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        self.module.load_state_dict(under("top", tensors))
        restore_optimizer(self._optimizer, under("optimizer", tensors))


class StoredTop(Top):
    """A top that learns from stored activations.

    Args:
        store: of released activations.
        Others as in `Top`.
    """

    def __init__(
        self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, device: str, store: ActivationStore
    ) -> None:
        super().__init__(module, optimizer, task, device)
        self.store = store

    def learn_stored(self, rows: Sequence[Row], seed: int) -> float:
        """One training step on stored rows.

        Returns:
            The mean loss.

        Raises:
            Refused: 312 the loss is not finite; nothing was changed.
        """
        loss, _ = self.learn(*self.store.gather(rows), seed)
        return loss


class Middle(Top):
    """The server's layers between the site's bottom and the site's head (split_u).

    The gradient at the head arrives later than the forward that it belongs to, and other batches
    may have changed the weights in between. So the weights of that forward are kept (weight
    stashing: Harlap et al., PipeDream, SOSP 2019, section 3.3), its forward is recomputed with
    them, and the resulting gradient is applied to the present weights.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerSection, task: TaskSection, device: str) -> None:
        super().__init__(module, optimizer, task, device)
        self._steps = 0
        self._stash: dict[int, dict[str, torch.Tensor]] = {}
        """Parameters by number of steps, for the versions that open forwards used."""

    def forward(self, smashed: torch.Tensor, seed: int, training: bool) -> tuple[torch.Tensor, int]:
        """Activations (batch, *head) for the head, and the version of the weights that made them."""
        if not training:
            return self.predict(smashed), self._steps
        if self._steps not in self._stash:
            self._stash[self._steps] = {
                name: parameter.detach().clone() for name, parameter in self.module.named_parameters()
            }
        self.module.train()
        with torch.no_grad(), seeded(seed, self._device):
            # Buffers are copied: only the recomputation may count towards running statistics.
            weights = {**self._stash[self._steps], **buffers_of(self.module)}
            outputs: torch.Tensor = functional_call(self.module, weights, smashed.to(self._device))
        if not is_finite(outputs):
            raise _diverged("activations")
        return outputs.cpu(), self._steps

    def backward(self, smashed: torch.Tensor, gradient: torch.Tensor, version: int, seed: int) -> torch.Tensor:
        """Apply the gradient (batch, *head) at the head's input; returns that at the cut (batch, *cut)."""
        inputs = smashed.to(self._device, copy=True).requires_grad_()
        stashed = self._stash[version]
        parameters = {name: stashed[name].clone().requires_grad_() for name, _ in self.module.named_parameters()}
        buffers = buffers_of(self.module)
        self.module.train()
        with seeded(seed, self._device):
            outputs = functional_call(self.module, {**parameters, **buffers}, inputs)
        at_cut, *at_parameters = torch.autograd.grad(outputs, [inputs, *parameters.values()], gradient.to(self._device))
        if not is_finite(at_cut):
            raise _diverged("gradient")
        self.module.load_state_dict(buffers, strict=False)
        for parameter, parameter_gradient in zip(self.module.parameters(), at_parameters, strict=True):
            parameter.grad = parameter_gradient
        self._optimizer.step()
        self._steps += 1
        return at_cut.cpu()

    def forget(self, needed: set[int]) -> None:
        """Drop the stashed weights of all versions but these."""
        self._stash = {version: weights for version, weights in self._stash.items() if version in needed}

    def state(self) -> dict[str, torch.Tensor]:
        """Entries for a snapshot."""
        entries = super().state()
        entries["steps"] = torch.tensor(self._steps)
        for version, weights in self._stash.items():
            entries.update(flatten(f"stash/{version}", weights))
        return entries

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        super().restore(tensors)
        self._steps = int(tensors["steps"])
        versions = {name.split("/")[0] for name in under("stash", tensors)}
        self._stash = {
            int(version): {name: tensor.to(self._device) for name, tensor in under(f"stash/{version}", tensors).items()}
            for version in versions
        }


def _diverged(what: str) -> Refused:
    return Refused(
        312, f"this batch gives a {what} that is not finite.", "lower optimizer.lr, or check the site's data."
    )


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a module's buffers, such as running statistics."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def refuse_unless_finite(loss: torch.Tensor, module: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Raise `Refused` 312 for a loss that no step can be made of; the module's buffers are then as `before`."""
    if not torch.isfinite(loss):
        module.load_state_dict(before, strict=False)
        raise Refused(312, f"the loss of this batch is {loss.item()}.", "lower optimizer.lr, or check the site's data.")
