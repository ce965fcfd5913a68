"""The site's layers, which learn from gradients that come late.

The forward of item q uses the retained version q - window, and the gradient that answers it may arrive when other
gradients were applied in between, or in another process on another day. So the weights of all versions still in flight
are kept (the bottom is small), and the forward is recomputed from (version, inputs, seed) when the gradient arrives:

    version      0 ──g1──▶ 1 ──g2──▶ 2 ──g3──▶ 3        one step per answered item
    forward      of items 1..W      W+1      W+2        each by its retained version
    gradient g_q is taken at version_of(q), and applied to the present weights

While a process lives, the graph of a forward is still there when its gradient arrives, and saves
recomputing it; the result is the same to the bit.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call

from nightsplit.shared.config.run import OptimizerSection
from nightsplit.shared.learning.bounds import check_bounded
from nightsplit.shared.learning.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from nightsplit.shared.learning.seeds import seeded
from nightsplit.shared.protocols.plan import Item
from nightsplit.shared.storage.checkpoint import flatten, under

GRAPHS = 8
"""Forwards whose graph is kept. A longer window is answered hours later, by a recomputation."""


Weights = dict[str, torch.Tensor]
"""Parameters, then buffers, of one version of the bottom. Tensors are shared between versions and never changed."""


class Bottom:
    """The layers in front of the cut, with their versions and their optimizer.

    They are moved to `device`; tensors go in and come out on the CPU. `version`, which names the present weights,
    counts the answered items.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerSection, device: str) -> None:
        self.module = module.to(device)
        self.version = 0
        self._optimizer = make_optimizer(optimizer, module.parameters())
        self._device = device
        self._parameters = [name for name, _ in module.named_parameters()]
        self._versions = {0: self._present()}
        self._graphs: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        # A kept graph has already counted its batch into running statistics: those must be
        # counted when the gradient is applied, so a bottom with buffers always recomputes.
        self._keeps_graphs = not dict(module.named_buffers())

    def forward(self, item: Item, inputs: torch.Tensor, seed: int, training: bool) -> torch.Tensor:
        """Smashed data (batch, *cut) of an item by its version, which is retained; changes no weights.

        `inputs` are float32 (batch, ...), `seed` is that of dropout; the graph may be kept.
        """
        keep = training and self._keeps_graphs and len(self._graphs) < GRAPHS
        with torch.set_grad_enabled(keep):
            outputs, parameters, _ = self._run(self._versions[item.version], inputs, seed, training)
        if keep and outputs.requires_grad:
            self._graphs[item.number] = outputs, parameters
        return outputs.detach().cpu()

    def apply_gradient(self, item: Item, inputs: torch.Tensor, seed: int, gradient: torch.Tensor) -> None:
        """Apply the gradient (batch, *cut) of a training item; inputs and seed are those of its forward.

        Raises:
            Refused: 312 what it makes is not finite; no weight was changed.
        """
        buffers: Mapping[str, torch.Tensor] = {}
        if item.number in self._graphs:
            outputs, parameters = self._graphs.pop(item.number)
        else:
            then, now = self._versions[item.version], self._versions[self.version]
            used = {**now, **{name: then[name] for name in self._parameters}}
            outputs, parameters, buffers = self._run(used, inputs, seed, training=True)
        if outputs.requires_grad:
            gradients = torch.autograd.grad(outputs, parameters, gradient.to(self._device))
            check_bounded("gradients", *gradients, *buffers.values())
            for parameter, its_gradient in zip(self.module.parameters(), gradients, strict=True):
                parameter.grad = its_gradient
            self._optimizer.step()
        self.module.load_state_dict(buffers, strict=False)
        self._advance(self._present())

    def skip_checkpoint(self, item: Item) -> None:
        """Count an item as answered without a gradient."""
        self._graphs.pop(item.number, None)
        self._advance(self._versions[self.version])

    def merge(self, version: int, mean: Mapping[str, torch.Tensor]) -> None:
        """Take over averaged weights; `version` is what this site had sent.

        Steps made since that version are kept on top: with window 1 there are none, and the
        present weights become the mean itself.

        Raises:
            Refused: 312 the weights would not be finite; none was changed.
        """
        sent, present = self._versions[version], self._versions[self.version]
        merged = {name: mean[name].to(self._device) + (present[name] - sent[name]) for name in mean}
        check_bounded("averaged weights", *merged.values())
        self.module.load_state_dict(merged, strict=False)
        self._advance(self._present())

    def weights(self, version: int) -> Weights:
        """Parameters and buffers of a retained version; not to be changed."""
        return self._versions[version]

    def forget(self, below: int) -> None:
        """Drop versions that no item can need any more."""
        self._versions = {version: kept for version, kept in self._versions.items() if version >= below}

    def state(self) -> dict[str, torch.Tensor]:
        """Entries for a snapshot."""
        entries = flatten("optimizer", optimizer_tensors(self._optimizer))
        for version, kept in self._versions.items():
            # Versions without a step between them share their weights; so do their entries.
            if version == min(self._versions) or kept is not self._versions[version - 1]:
                entries.update(flatten(f"bottom/{version}", kept))
        entries["versions"] = torch.tensor([min(self._versions), self.version])
        return entries

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `state`."""
        first, self.version = (int(version) for version in tensors["versions"])
        self._versions, self._graphs = {}, {}
        for version in range(first, self.version + 1):
            stored = under(f"bottom/{version}", tensors)
            if stored or version == first:
                self.module.load_state_dict(stored)
                self._versions[version] = self._present()
            else:
                self._versions[version] = self._versions[version - 1]
        restore_optimizer(self._optimizer, under("optimizer", tensors))

    def _run(
        self, weights: Weights, inputs: torch.Tensor, seed: int, training: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        """Outputs, the leaves they depend on, and the buffers after the run."""
        parameters = {name: weights[name].detach().requires_grad_() for name in self._parameters}
        buffers = {name: tensor.clone() for name, tensor in weights.items() if name not in parameters}
        self.module.train(training)
        with seeded(seed, self._device):
            outputs = functional_call(self.module, {**parameters, **buffers}, inputs.to(self._device))
        return outputs, list(parameters.values()), buffers

    def _present(self) -> Weights:
        present = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: tensor.detach().clone() for name, tensor in present.items()}

    def _advance(self, weights: Weights) -> None:
        self.version += 1
        self._versions[self.version] = weights
