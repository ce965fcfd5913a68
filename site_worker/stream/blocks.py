"""The site's side of a run that learns by targets (docs/explanation/nights.md).

    answers of a night         the site
    head_input of block b      fits its head to the block, and computes the displacements that it asks for (split_u)
    cut_target of block b      fits its bottom to them, which makes version b of the bottom

What a fit needs is kept until the fit is over, so that a process that is killed in between goes on with it.
"""

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import nn
from typing_extensions import override

from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Record
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.block_fit import BlockFit, Unit
from nightsplit.shared.learning.bounds import check_bounded
from nightsplit.shared.learning.displacement import Sums
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.learning.seeds import Seed
from nightsplit.shared.protocols.blocks import BlockPlan
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Message
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.stream.bottom import Bottom
from nightsplit.site_worker.stream.role import StreamSite

BOTTOM = "bottom"
"""Part of a fit of the layers in front of the cut."""


class BlockBottom(Bottom):
    """Layers in front of the cut, whose version is the number of blocks that they have learnt of."""

    def __init__(self, module: nn.Module, optimizer: OptimizerSection, device: str) -> None:
        super().__init__(module, optimizer, device)
        self._keeps_graphs = False

    def fit_step(
        self, item: Item, inputs: torch.Tensor, seed: Seed, displacement: torch.Tensor, progress: Progress
    ) -> None:
        """Perform a step towards the outputs of the item's version plus a displacement (batch, *cut).

        Raises:
            Refused: 312 weight gradients or statistics are not finite; then no weight was changed.
        """
        displacement = displacement.to(self._device)
        with torch.no_grad():
            then, _, _ = self._run(self._versions[item.version], inputs, seed, training=True)
        outputs, parameters, buffers = self._run(self._copy_weights(), inputs, seed, training=True)
        error = outputs.detach() - (then + displacement)
        gradient = error / len(error)  # of mean_i |error_i|^2 / 2
        self._step(outputs, parameters, buffers, gradient, progress)

    @override
    def skip(self, item: Item) -> None:
        """Do nothing: an item without a displacement has no part in its block's fit."""

    @override
    def merge(self, version: int, mean: Mapping[str, torch.Tensor]) -> None:
        self._merge(self._versions[version], mean)

    def close_block(self) -> None:
        """Make the present weights the version of one more block."""
        self._advance(self._copy_weights())

    @override
    def state(self) -> dict[str, torch.Tensor]:
        return {**super().state(), **flatten("fitted", self._copy_weights())}

    @override
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().restore(tensors)
        self.module.load_state_dict(under("fitted", tensors))


class BlockSite(StreamSite):
    """Role that fits its layers to a block of answers at a time; arguments as of `StreamSite`."""

    bottom_class = BlockBottom
    bottom: BlockBottom

    def __init__(
        self, name: str, config: RunConfig, model: SplitModel, splits: Splits, incarnation: str, device: str,
        seed: Seed,
    ) -> None:  # fmt: skip
        super().__init__(name, config, model, splits, incarnation, device, seed)
        assert isinstance(self.batches.plan, BlockPlan)
        self.plan = self.batches.plan
        self._seed = seed
        self._fit: BlockFit | None = None
        self._displacements: dict[int, torch.Tensor] = {}
        """Displacements at the cut of the block that is being answered, by item."""

    @property
    @override
    def busy(self) -> bool:
        return self._fit is not None

    @override
    def next(self) -> list[Effect]:
        if self._fit is None:
            return super().next()
        fit, unit = self._fit, self._fit.unit(self._seed)
        if unit is None:
            self._fit = None
            self.end_fit(fit)
        else:
            sums = None
            with suppress(Refused):  # a step that would spoil the layers is left out
                sums = self.perform(fit, unit)
            self._fit = fit.advanced(sums)
        return [Record({"event": "local", "step": fit.done})]

    def begin_fit(self, part: str, item: Item, inputs: Mapping[int, torch.Tensor]) -> None:
        """Begin to fit a part to the items with these inputs, all of the block of `item`; without any, end at once."""
        answers = part != BOTTOM  # nobody waits for a displacement in front of the bottom
        fit = BlockFit(
            part, self.name, self.plan.block_of(item.number), tuple(sorted(inputs)), self.config.run.passes, answers
        )
        if inputs:
            self._fit = fit
        else:
            self.end_fit(fit)

    def perform(self, fit: BlockFit, unit: Unit) -> Sums | None:
        """Perform a unit of a fit; Refused 312 without a change."""
        item = self.plan.item(unit.item)
        seed, displacement = self.batches.seed("bottom", item), self._displacements[unit.item]
        self.bottom.fit_step(item, self.batches.inputs(item), seed, displacement, self.progress(fit, item))
        return None

    def progress(self, fit: BlockFit, item: Item) -> Progress:
        """Return the progress of a part's training before a step of a fit."""
        return self.plan.progress(item)._replace(step=(fit.block - 1) * fit.passes * len(fit.items) + fit.done)

    def end_fit(self, fit: BlockFit) -> None:
        """Use the layers of a fit that is over."""
        self._displacements.clear()
        if self.config.run.bottoms == "independent":
            self.bottom.close_block()

    @override
    def apply_answer(self, item: Item, message: Message) -> None:
        displacement = message.tensors["displacement"].clone()
        check_bounded("displacements", displacement)
        self._displacements[item.number] = displacement

    @override
    def count_answer(self, slot: Slot, evaluated: int) -> None:
        super().count_answer(slot, evaluated)
        if not slot.completes_item:
            return
        if self.plan.ends_training(slot.item):
            self.begin_fit(BOTTOM, slot.item, self._displacements)
        elif slot.item.purpose is Purpose.AVERAGE:
            self.bottom.close_block()

    @override
    def _required_answer(self, slot: Slot) -> int:
        if slot.half == "second":
            return self.sequence.seq_of_first(self.plan.block_end(self.plan.block_of(slot.item.number)))
        return self.sequence.completing_seq(self.plan.block_end(slot.item.version)) if slot.item.version else 0

    @override
    def _oldest_version(self, seq: int) -> int:
        oldest = super()._oldest_version(seq)
        if self._fit is None or self._fit.part != BOTTOM:
            return oldest
        return min(oldest, self.plan.item(self._fit.items[0]).version)

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        tensors = {**base.tensors, **flatten("displacements", self._displacements)}
        return Snapshot(tensors, {**base.facts, "fit": self._fit and self._fit.facts()})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        stored = under("displacements", snapshot.tensors)
        self._displacements = {int(q): tensor for q, tensor in stored.items()}
        facts = snapshot.facts["fit"]
        self._fit = facts and BlockFit.of(facts, self.config.run.passes)
