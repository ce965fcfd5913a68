"""The site's layers, trained with delayed gradients.

The forward of item q uses the retained version q - window. Its gradient may arrive after other gradients were
applied, or in another process on another day. So the weights of all versions still in flight are kept (the bottom is
small), and the forward is recomputed from (version, inputs, seed) when the gradient arrives:

    version      0 ──g1──▶ 1 ──g2──▶ 2 ──g3──▶ 3        one step per answered item
    forward      of items 1..W      W+1      W+2        each by its retained version
    gradient g_q is taken at version_of(q), and applied to the present weights

A process that still has the graph of the forward uses it instead; the result is the same to the bit.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.learning.bounds import WRECK, RunningBound, check_bounded
from nightsplit.shared.learning.optimizers import PartOptimizer, Progress
from nightsplit.shared.learning.seeds import Seed, seeded
from nightsplit.shared.protocols.plan import Item
from nightsplit.shared.storage.checkpoint import flatten, under
from nightsplit.shared.wire.message import SERVER

GRAPHS_MAX = 8
"""Most graphs that are kept. With a longer window the gradient arrives hours later, and the forward is recomputed."""

Weights = dict[str, torch.Tensor]
"""Parameters, then buffers, of one version of the bottom. Tensors are shared between versions and never changed."""


class Bottom:
    """Layers in front of the cut, with their versions and their optimizer.

    The layers are moved to `device`; arguments and results are on the CPU. `version`, that of the present weights, is
    the number of answered items.
    """

    def __init__(self, module: nn.Module, optimizer: OptimizerSection, device: str) -> None:
        self.module = module.to(device)
        self.version = 0
        self._optimizer = PartOptimizer(optimizer, module.parameters())
        self._device = device
        self._parameters = [name for name, _ in module.named_parameters()]
        self._versions = {0: self._copy_weights()}
        self._graphs: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self._bound = RunningBound((SERVER,), outlier=WRECK)
        # A kept graph has already updated the running statistics, which must change when the gradient is applied:
        # a bottom with buffers always recomputes.
        self._keeps_graphs = not dict(module.named_buffers())

    def forward(self, item: Item, inputs: torch.Tensor, seed: Seed, training: bool) -> torch.Tensor:
        """Return the smashed data (batch, *cut) of an item by its retained version; changes no weights.

        `inputs` are float32 (batch, ...), `seed` is that of dropout; the graph may be kept.
        """
        keep = training and self._keeps_graphs and len(self._graphs) < GRAPHS_MAX
        with torch.set_grad_enabled(keep):
            outputs, parameters, _ = self._run(self._versions[item.version], inputs, seed, training)
        if keep and outputs.requires_grad:
            self._graphs[item.number] = outputs, parameters
        return outputs.detach().cpu()

    def apply_gradient(
        self, item: Item, inputs: torch.Tensor, seed: Seed, gradient: torch.Tensor, progress: Progress
    ) -> None:
        """Apply the gradient (batch, *cut) of a training item; inputs and seed are those of its forward.

        `progress` is that of the bottom's training. Refused 312 if weight gradients or statistics are not finite; then
        no weight was changed.
        """
        buffers: Mapping[str, torch.Tensor] = {}
        if item.number in self._graphs:
            outputs, parameters = self._graphs.pop(item.number)
        else:
            old, present = self._versions[item.version], self._versions[self.version]
            weights = {**present, **{name: old[name] for name in self._parameters}}
            outputs, parameters, buffers = self._run(weights, inputs, seed, training=True)
        self._step(outputs, parameters, buffers, gradient.to(self._device), progress)
        self._advance(self._copy_weights())

    def skip(self, item: Item) -> None:
        """Count an item as answered without a gradient."""
        self._graphs.pop(item.number, None)
        self._advance(self._versions[self.version])

    def merge(self, version: int, mean: Mapping[str, torch.Tensor]) -> None:
        """Adopt averaged weights; `version` is the version that this site had sent.

        Changes since that version are added: with window 1 there are none, and the present weights become the mean
        itself. Refused 312 if the weights would not be finite; then none was changed.
        """
        self._merge(self._versions[version], mean)
        self._advance(self._copy_weights())

    def weights(self, version: int) -> Weights:
        """Return the parameters and buffers of a retained version; not to be changed."""
        return self._versions[version]

    def forget(self, below: int) -> None:
        """Drop versions that no item can need any more."""
        self._versions = {version: weights for version, weights in self._versions.items() if version >= below}

    def state(self) -> dict[str, torch.Tensor]:
        """Return the entries for a snapshot."""
        entries = {**flatten("optimizer", self._optimizer.state()), **flatten("bound", self._bound.state())}
        for version, weights in self._versions.items():
            # Versions without a step between them share their weights and their entries.
            if version == min(self._versions) or weights is not self._versions[version - 1]:
                entries.update(flatten(f"bottom/{version}", weights))
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
                self._versions[version] = self._copy_weights()
            else:
                self._versions[version] = self._versions[version - 1]
        self._optimizer.restore(under("optimizer", tensors))
        self._bound.restore(under("bound", tensors))

    def _merge(self, sent: Weights, mean: Mapping[str, torch.Tensor]) -> None:
        present = self._copy_weights()
        merged = {name: mean[name].to(self._device) + (present[name] - sent[name]) for name in mean}
        check_bounded("averaged weights", *merged.values())
        self.module.load_state_dict(merged, strict=False)

    def _step(
        self, outputs: torch.Tensor, parameters: list[torch.Tensor], buffers: Mapping[str, torch.Tensor],
        gradient: torch.Tensor, progress: Progress,
    ) -> None:  # fmt: skip
        """Apply the gradient at the outputs of a forward to the module; Refused 312 without a change."""
        if outputs.requires_grad:
            gradients = torch.autograd.grad(outputs, parameters, gradient)
            check_bounded("gradients", *gradients, *buffers.values())
            for parameter, parameter_gradient in zip(self.module.parameters(), gradients, strict=True):
                parameter.grad = parameter_gradient
            self._optimizer.step(progress, partial(self._bound.limit, SERVER))
        self.module.load_state_dict(buffers, strict=False)

    def _run(
        self, weights: Weights, inputs: torch.Tensor, seed: Seed, training: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the outputs, their leaf parameters, and the buffers after the forward."""
        parameters = {name: weights[name].detach().requires_grad_() for name in self._parameters}
        buffers = {name: tensor.clone() for name, tensor in weights.items() if name not in parameters}
        self.module.train(training)
        with seeded(seed, self._device):
            outputs = functional_call(self.module, {**parameters, **buffers}, inputs.to(self._device))
        return outputs, list(parameters.values()), buffers

    def _copy_weights(self) -> Weights:
        present = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: tensor.detach().clone() for name, tensor in present.items()}

    def _advance(self, weights: Weights) -> None:
        self.version += 1
        self._versions[self.version] = weights
