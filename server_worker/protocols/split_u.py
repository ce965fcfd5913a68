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

from nightsplit.server_worker.stream.ddp import Group
from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.server_worker.stream.top import Middle
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect
from nightsplit.shared.errors import Refused, mismatch
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
            return self._add_report(site, item, message)
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

    def _add_report(self, site: str, item: Item, message: Message) -> list[Effect]:
        """Apply a report, which a site sends in place of a gradient at the head.

        At the end of a block it has the block's figures. For a training item it says that the site could not use the
        head's input: the item is closed without a step.
        """
        figures = self.read_figures(message, due=item.ends_block)
        self._close_item(site, item)
        effects: list[Effect] = []
        if item.ends_block:
            effects = self.close_evaluation(item.epoch, self.evaluation.report(site, item.epoch, figures))
        return [self.answer(site, message.header.seq, Kind.NOTED), *effects]

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


ROLE = SplitUServer
