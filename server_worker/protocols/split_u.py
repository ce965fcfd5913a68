"""split_u, the U-shaped extension of Ha et al.: the last layers and the labels stay at the site.

    site                                    server
    bottom, forward  ─── Smashed(q) ──────▶ middle, forward
    head, loss       ◀── HeadInput(q) ─────
                     ─── HeadGradient(q) ─▶ middle, backward and step
    bottom, step     ◀── CutGradient(q) ───

For held-out patients the server receives the site's own figures (Report), not their labels.
"""

from pathlib import Path
from typing import Self

import torch
from typing_extensions import override

from nightsplit.server_worker.stream.activation_store import ActivationStore
from nightsplit.server_worker.stream.blocks import BlockServer
from nightsplit.server_worker.stream.ddp import Group
from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.server_worker.stream.top import FittedMiddle, Middle
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.errors import Refused, mismatch
from nightsplit.shared.learning.block_fit import Unit
from nightsplit.shared.learning.bounds import check_bounded
from nightsplit.shared.learning.displacement import Sums
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Header, Kind, Message


class SplitUServer(StreamServer):
    """Server role of split_u, which holds the layers in the middle."""

    top: Middle

    def __init__(self, config: RunConfig, top: Middle, model: SplitModel) -> None:
        super().__init__(config, top, model)
        self._open: dict[str, dict[int, tuple[int, torch.Tensor]]] = {site: {} for site in config.run.sites}
        """Version of the middle and smashed data of each training item without its gradient at the head, by number."""

    @classmethod
    @override
    def make(cls, config: RunConfig, model: SplitModel, state: Path, device: str, group: Group | None) -> Self:
        return cls(config, Middle(model.parts.top, config.optimizer.of("top"), config.task, device), model)

    @override
    def apply_item(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        kind, seq, item, q = message.header.kind, slot.seq, slot.item, slot.item.number
        seed = seed_for(self.config.run.seed, "top", site, q)
        if kind is Kind.SMASHED:
            training = item.purpose is Purpose.TRAIN
            batch = self.bounds.scale(site, message.tensors) if training else message.tensors
            smashed = batch["smashed"].clone()
            activations, version = self.top.forward(smashed, seed, training)
            answer = self.answer(site, seq, Kind.HEAD_INPUT, {"activations": activations})
            if not training:
                return [answer]
            self._open[site][q] = version, smashed
            return [answer, *self.close_batch(site, None)]
        if kind is Kind.REPORT:
            effects = self.apply_report(site, item, message)
            self._close_item(site, item)
            return effects
        if q not in self._open[site]:
            raise mismatch(f"item {q} has no forward pass that waits for a gradient.")
        version, smashed = self._open[site][q]
        progress, limit = self.progress_at(site, item), self.bounds.limit(site)
        at_cut = self.top.backward(smashed, message.tensors["gradient"], version, seed, progress, limit)
        self._close_item(site, item)
        records = self.record_step(site, item, None)
        return [self.answer(site, seq, Kind.CUT_GRADIENT, {"gradient": at_cut}), *records]

    @override
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        # An item with a refused gradient at the head is closed without a step.
        self._close_item(header.sender, self.sequences[header.sender].slot(header.seq).item)
        return super().refused(header, refusal)

    @override
    def exclude(self, sender: str) -> list[Effect]:
        self._open[sender].clear()  # their gradients will not come
        self._drop_weights()
        return super().exclude(sender)

    def _close_item(self, site: str, item: Item) -> None:
        self._open[site].pop(item.number, None)
        self._drop_weights()

    def _drop_weights(self) -> None:
        self.top.forget({version for items in self._open.values() for version, _ in items.values()})

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        tensors = dict(base.tensors)
        versions = {}
        for site, items in self._open.items():
            tensors.update(flatten(f"open/{site}", {str(q): smashed for q, (_, smashed) in items.items()}))
            versions[site] = {str(q): version for q, (version, _) in items.items()}
        return Snapshot(tensors, {**base.facts, "open": versions})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        for site, versions in snapshot.facts["open"].items():
            smashed = under(f"open/{site}", snapshot.tensors)
            self._open[site] = {int(q): (version, smashed[q]) for q, version in versions.items()}


class SplitUTargets(BlockServer):
    """Server role of split_u that fits the layers in the middle to displacements of their outputs."""

    top: FittedMiddle

    def __init__(self, config: RunConfig, top: FittedMiddle, model: SplitModel, state: Path) -> None:
        super().__init__(config, top, model, state)
        self._asked = ActivationStore(state / "displacements")

    @classmethod
    @override
    def make(cls, config: RunConfig, model: SplitModel, state: Path, device: str, group: Group | None) -> Self:
        return cls(config, FittedMiddle(model.parts.top, config.optimizer.of("top"), config.task, device), model, state)

    @override
    def apply_item(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        kind, item = message.header.kind, slot.item
        if kind is Kind.REPORT:
            effects = self.apply_report(site, item, message)
            self.forget(site, item.number)
            return effects
        if kind is Kind.HEAD_TARGET:
            if not self.store.has(site, item.number):
                raise mismatch(f"item {item.number} has no forward pass that waits for a displacement.")
            check_bounded("displacements", *message.tensors.values())
            self._asked.put(site, item.number, self.bounds.scale(site, message.tensors))
            self.collect(site, slot)
            return self.close_batch(site, None)
        if item.purpose is not Purpose.TRAIN:
            activations = self.top.predict(message.tensors["smashed"])
            return [self.answer(site, slot.seq, Kind.HEAD_INPUT, {"activations": activations})]
        smashed = self.bounds.scale(site, message.tensors)["smashed"]
        activations = self.top.forward(smashed, self._seed(item, site))
        self.store.put(site, item.number, {"smashed": smashed, "activations": activations})
        return [
            self.answer(site, slot.seq, Kind.HEAD_INPUT, {"activations": activations}),
            *self.close_batch(site, None),
        ]

    @override
    def fit(self, item: Item, site: str, unit: Unit) -> float:
        progress, limit = self.progress_at(site, item), self.bounds.limit(site)
        return self.top.fit_step(self._batch(item, site), self._seed(item, site), progress, limit)

    @override
    def measure(self, item: Item, site: str) -> Sums:
        return self.top.direction(self._batch(item, site), self._seed(item, site))[1]

    @override
    def displace(self, item: Item, site: str, step: float) -> torch.Tensor:
        return step * self.top.direction(self._batch(item, site), self._seed(item, site))[0].cpu()

    @override
    def forget(self, site: str, q: int) -> None:
        super().forget(site, q)
        self._asked.remove(site, q)

    def _seed(self, item: Item, site: str) -> int:
        return seed_for(self.config.run.seed, "top", site, item.number)

    def _batch(self, item: Item, site: str) -> dict[str, torch.Tensor]:
        return {**self.store.get(site, item.number), **self._asked.get(site, item.number)}


ROLE = SplitUServer
TARGETS_ROLE = SplitUTargets
