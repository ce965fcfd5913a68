"""split_u, the U-shaped extension of Ha et al.: the last layers and the labels stay at the site."""

from functools import partial

import torch
from typing_extensions import override

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Send
from nightsplit.shared.learning.block_fit import BlockFit, Unit
from nightsplit.shared.learning.bounds import WRECK, RunningBound, check_bounded
from nightsplit.shared.learning.displacement import HEAD_REACH, Sums, gradients, head_sums
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.learning.seeds import Seed, seed_for
from nightsplit.shared.learning.stage import Stage
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.report import NO_FIGURES, encode_report
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import SERVER, Kind, Message
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.stream.blocks import BlockSite
from nightsplit.site_worker.stream.role import StreamSite

HEAD = "head"
"""Part of a fit of the layers with the labels."""


class SplitUSite(StreamSite):
    """Role with the bottom, the head and the labels."""

    def __init__(
        self, name: str, config: RunConfig, model: SplitModel, splits: Splits, incarnation: str, device: str,
        seed: Seed,
    ) -> None:  # fmt: skip
        super().__init__(name, config, model, splits, incarnation, device, seed)
        assert model.parts.head is not None
        self.head = Stage(model.parts.head, config.optimizer.of("head"), config.task, device)
        self._bound = RunningBound((SERVER,), outlier=WRECK)
        """Bound on the head's gradients, which depend on the server's activations."""
        self._at_head: dict[int, torch.Tensor] = {}
        """Gradients at the head's input, or displacements of it, by item, until their message is answered."""
        self._reports: dict[int, str] = {}
        """Metrics by the last item of their block, until their message is answered."""
        self._outputs: dict[int, torch.Tensor] = {}
        """Outputs for the held-out samples of the open evaluation block, by item."""
        self._heads: dict[int, dict[str, torch.Tensor]] = {}
        """Head of each evaluated epoch that may still be the best."""

    @override
    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        return {**super().model(), "head": self._heads.get(self.best, self.head.module.state_dict())}

    @override
    def first_half(self, slot: Slot) -> Send:
        return self.message_at(slot, Kind.SMASHED, {"smashed": self.forward(slot.item)})

    @override
    def second_half(self, slot: Slot) -> Send:
        q = slot.item.number
        if q in self._at_head:
            return self.message_at(slot, Kind.HEAD_GRADIENT, {"gradient": self._at_head[q]})
        # Also if the head's input was refused: then there is no gradient, and no report.
        return self.message_at(slot, Kind.REPORT, {}, metrics=self._reports.get(q, NO_FIGURES))

    @override
    def apply_answer(self, item: Item, message: Message) -> None:
        if message.header.kind is Kind.CUT_GRADIENT:
            self.apply_gradient(item, message.tensors["gradient"])
            return
        activations = message.tensors["activations"]
        if item.purpose is Purpose.TRAIN:
            targets, seed = self.batches.targets(item), self.batches.seed("head", item)
            progress, limit = self.batches.plan.progress(item), partial(self._bound.limit, SERVER)
            _, self._at_head[item.number] = self.head.train_step(activations, targets, seed, progress, limit)
        else:
            self._outputs[item.number] = self.head.predict(activations)

    @override
    def count_answer(self, slot: Slot, evaluated: int) -> None:
        item = slot.item
        if item.ends_block and not slot.completes_item:  # the last head input of the block, even if it was refused
            self._reports[item.number] = self._evaluate()
            self._heads = {epoch: head for epoch, head in self._heads.items() if self.is_candidate(epoch)}
            self._heads[item.epoch] = {name: tensor.clone() for name, tensor in self.head.module.state_dict().items()}
        super().count_answer(slot, evaluated)

    def _evaluate(self) -> str:
        """Measure the block that just ended; return the metrics as JSON."""
        metrics = {}
        block = [self.batches.plan.item(q) for q in sorted(self._outputs)]
        for part in (Purpose.VALIDATION, Purpose.TEST):
            if items := [item for item in block if item.purpose is part]:
                outputs = torch.cat([self._outputs[item.number] for item in items])
                targets = torch.cat([self.batches.targets(item) for item in items])
                metrics[part.value] = measure(self.config.task, self.config.data, outputs, targets)
        self._outputs.clear()
        return encode_report(self.config.task, metrics)

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        oldest = self.oldest_seq(first_unconfirmed)
        for by_item in (self._at_head, self._reports):
            for q in [q for q in by_item if self.sequence.completing_seq(q) < oldest]:
                del by_item[q]
        tensors = {**base.tensors, **flatten("at_head", self._at_head), **flatten("outputs", self._outputs)}
        tensors.update(flatten("head", self.head.module.state_dict()))
        tensors.update(flatten("head_optimizer", self.head.optimizer.state()))
        tensors.update(flatten("head_bound", self._bound.state()))
        for epoch, head in self._heads.items():
            tensors.update(flatten(f"candidate_head/{epoch}", head))
        return Snapshot(tensors, {**base.facts, "reports": {**self._reports}, "heads": list(self._heads)})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        tensors = snapshot.tensors
        self.head.module.load_state_dict(under("head", tensors))
        self.head.optimizer.restore(under("head_optimizer", tensors))
        self._bound.restore(under("head_bound", tensors))
        self._at_head = {int(q): tensor for q, tensor in under("at_head", tensors).items()}
        self._outputs = {int(q): tensor for q, tensor in under("outputs", tensors).items()}
        self._reports = {int(q): text for q, text in snapshot.facts["reports"].items()}
        self._heads = {epoch: under(f"candidate_head/{epoch}", tensors) for epoch in snapshot.facts["heads"]}


class SplitUTargets(BlockSite, SplitUSite):
    """Role that fits its head to a night's activations, and tells the server what displacement of them it asks for."""

    def __init__(
        self, name: str, config: RunConfig, model: SplitModel, splits: Splits, incarnation: str, device: str,
        seed: Seed,
    ) -> None:  # fmt: skip
        super().__init__(name, config, model, splits, incarnation, device, seed)
        self._device = device
        self._head_inputs: dict[int, torch.Tensor] = {}
        """Activations of the block that the head is to be fitted to, by item."""

    @override
    def second_half(self, slot: Slot) -> Send:
        q = slot.item.number
        if q in self._at_head:
            return self.message_at(slot, Kind.HEAD_TARGET, {"displacement": self._at_head[q]})
        return super().second_half(slot)

    @override
    def apply_answer(self, item: Item, message: Message) -> None:
        if message.header.kind is Kind.CUT_TARGET:
            super().apply_answer(item, message)
        elif item.purpose is Purpose.TRAIN:
            activations = message.tensors["activations"].clone()
            check_bounded("activations", activations)
            self._head_inputs[item.number] = activations
        else:
            SplitUSite.apply_answer(self, item, message)

    @override
    def count_answer(self, slot: Slot, evaluated: int) -> None:
        super().count_answer(slot, evaluated)
        if not slot.completes_item and self.plan.ends_training(slot.item):
            self.begin_fit(HEAD, slot.item, self._head_inputs)

    @override
    def perform(self, fit: BlockFit, unit: Unit) -> Sums | None:
        if fit.part != HEAD:
            return super().perform(fit, unit)
        item = self.plan.item(unit.item)
        inputs, targets = self._head_inputs[unit.item], self.batches.targets(item)
        if unit.phase == "train":
            seed = seed_for(self.batches.seed("head", item), unit.number)
            limit = partial(self._bound.limit, SERVER)
            self.head.train_step(inputs, targets, seed, self.progress(fit, item), limit)
            return None
        batch = self.config.task, self.head.module, inputs.to(self._device), targets.to(self._device)
        if unit.phase == "measure":
            return head_sums(*batch)
        step = HEAD_REACH[self.config.task.kind] * fit.sums.step
        self._at_head[unit.item] = (-step * gradients(*batch)).cpu()
        return None

    @override
    def end_fit(self, fit: BlockFit) -> None:
        if fit.part == HEAD:
            self._head_inputs.clear()
        else:
            super().end_fit(fit)

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        return Snapshot({**base.tensors, **flatten("head_inputs", self._head_inputs)}, base.facts)

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._head_inputs = {int(q): tensor for q, tensor in under("head_inputs", snapshot.tensors).items()}


ROLE = SplitUSite
TARGETS_ROLE = SplitUTargets
