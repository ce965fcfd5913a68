"""split_labels (Ha et al., IEEE Access 2021, doi 10.1109/ACCESS.2021.3108455): labels travel with the activations."""

from pathlib import Path
from typing import Self

import torch
from typing_extensions import override

from nightsplit.server_worker.stream.blocks import BlockServer
from nightsplit.server_worker.stream.ddp import Group
from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.server_worker.stream.top import Top
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.learning.block_fit import Unit
from nightsplit.shared.learning.bounds import check_bounded
from nightsplit.shared.learning.displacement import CUT_REACH, Sums
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.wire.message import Kind, Message


class SplitLabelsServer(StreamServer):
    """Server role of split_labels, which trains the top on each batch and returns the gradient at the cut."""

    @override
    def apply_item(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        item = slot.item
        if item.purpose is Purpose.TRAIN:
            batch = self.bounds.scale(site, message.tensors)
            self.bounds.expect(batch["targets"])
            seed = seed_for(self.config.run.seed, "top", site, item.number)
            loss, gradient = self.top.train_step(
                batch["smashed"], batch["targets"], seed, self.progress_at(site, item), self.bounds.limit(site)
            )
            records = self.record_step(site, item, loss)
            return [self.answer(site, slot.seq, Kind.CUT_GRADIENT, {"gradient": gradient}), *records]
        outputs = self.top.predict(message.tensors["smashed"])
        self.evaluation.add(site, item.purpose, outputs, message.tensors["targets"])
        effects = self.close_block(site, item) if item.ends_block else []  # first: the answer has the result
        return [self.answer(site, slot.seq, Kind.NOTED), *effects]


class SplitLabelsTargets(BlockServer, SplitLabelsServer):
    """Server role that trains the top on a site's block in several passes, and returns displacements at the cut."""

    knows_loss = True

    @classmethod
    @override
    def make(cls, config: RunConfig, model: SplitModel, state: Path, device: str, group: Group | None) -> Self:
        return cls(config, Top(model.parts.top, config.optimizer.of("top"), config.task, device), model, state)

    @override
    def apply_item(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        if slot.item.purpose is not Purpose.TRAIN:
            return super().apply_item(site, slot, message)
        check_bounded("activations and targets", *message.tensors.values())
        self.store.put(site, slot.item.number, self.bounds.scale(site, message.tensors))
        self.collect(site, slot)
        return self.close_batch(site, None)

    @override
    def fit(self, item: Item, site: str, unit: Unit) -> float:
        batch = self.store.get(site, item.number)
        self.bounds.expect(batch["targets"])
        seed = seed_for(self.config.run.seed, "top", site, item.number, unit.number)
        progress, limit = self.progress_at(site, item), self.bounds.limit(site)
        return self.top.train_step(batch["smashed"], batch["targets"], seed, progress, limit)[0]

    @override
    def measure(self, item: Item, site: str) -> Sums:
        return self.top.head_sums(**self.store.get(site, item.number))

    @override
    def displace(self, item: Item, site: str, step: float) -> torch.Tensor:
        gradients = self.top.gradients(**self.store.get(site, item.number))
        return -CUT_REACH[self.config.task.kind] * step * gradients


ROLE = SplitLabelsServer
TARGETS_ROLE = SplitLabelsTargets
