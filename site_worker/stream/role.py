"""The site's side of the Stream shape: sends its plan in order, and applies the answers."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from typing_extensions import override

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Send
from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.learning.seeds import Seed
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.places import check_answer, check_farewell
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.protocols.stream import Slot, StreamSequence, weights
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.codecs import is_finite
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.stream.batches import StreamBatches
from nightsplit.site_worker.stream.bottom import Bottom


class StreamSite(SiteRole):
    """Role that sends its plan item by item, as far ahead of the answers as the window allows.

    Args:
        name, config, incarnation: as of `SiteRole`.
        splits: the site's scaled data.
        device: of the site's layers.
        seed: of order, dropout and augmentation.
    """

    bottom_class: ClassVar[type[Bottom]] = Bottom

    def __init__(
        self, name: str, config: RunConfig, model: SplitModel, splits: Splits, incarnation: str, device: str,
        seed: Seed,
    ) -> None:  # fmt: skip
        super().__init__(name, config, model.contract, incarnation)
        self.bottom = self.bottom_class(model.parts.bottom, config.optimizer.of("bottom"), device)
        self.batches = StreamBatches(config, name, splits, seed)
        self.sequence: StreamSequence = self.batches.sequence
        self.exported_top: dict[str, torch.Tensor] = {}
        """Top of the best model, if the run exports it."""
        self._candidates: dict[int, dict[str, torch.Tensor]] = {}
        """Bottom of each evaluated epoch that may still be the best."""

    @abstractmethod
    def first_half(self, slot: Slot) -> Send:
        """Return the message with the first half of a batch's exchange."""

    def second_half(self, slot: Slot) -> Send:
        """Return the message with the second half of a batch's exchange; only protocols with a head have one."""
        raise NotImplementedError

    @abstractmethod
    def apply_answer(self, item: Item, message: Message) -> None:
        """Apply an answer with tensors to a batch, or raise Refused without a change."""

    @property
    @override
    def samples(self) -> tuple[int, int, int]:
        return self.batches.plan.train, self.batches.plan.validation, self.batches.plan.test

    @override
    def next(self) -> list[Effect]:
        if not self.at_work:
            return []
        if self.next_seq > self.sequence.last:
            # Everything is sent. If the farewell is counted already, it was refused: there is nothing to wait for.
            return self._finish({}) if self.answered == self.sequence.last_answer else self.tell_all_sent()
        if self.answered < self._required_answer(self.sequence.slot(self.next_seq)):
            return []
        send = self.message(self.next_seq)
        self.next_seq += 1
        return [send]

    @override
    def message(self, seq: int) -> Send:
        slot = self.sequence.slot(seq)
        item = slot.item
        if slot.half == "second":
            return self.second_half(slot)
        if item.purpose is not Purpose.AVERAGE:
            return self.first_half(slot)
        bottom = self.bottom.weights(item.version)
        averaged = {name: bottom[name].cpu() for name in weights(self.bottom.module)}
        return self.message_at(slot, Kind.BOTTOM, averaged)

    @override
    def on_answer(self, message: Message) -> list[Effect]:
        kind, scalars = message.header.kind, message.scalars
        if kind is Kind.FINISH:
            check_farewell(message, self.sequence, self.config.run)
            self.best = int(scalars["best"])
            return self._finish(message.tensors)
        slot = check_answer(message, self.sequence, self.config.run)
        if kind is Kind.AVERAGE:
            self.bottom.merge(slot.item.version, message.tensors)
        elif kind in (Kind.NOTED, Kind.REFUSED):
            self.skip(slot)
        else:
            self.apply_answer(slot.item, message)
        self.best = int(scalars["best"])
        self.count_answer(slot, int(scalars["judged"]))
        return []

    @override
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        # The item counts as answered, without a gradient.
        if header.seq >= self.sequence.last_answer:
            self.record_answer(header.seq, 0)
            return []
        slot = self.sequence.slot(header.seq)
        self.skip(slot)
        self.count_answer(slot, 0)
        return []

    # -- for subclasses ----------------------------------------------------------------------------

    def skip(self, slot: Slot) -> None:
        """Count an answer without a gradient."""
        if slot.completes_item:
            self.bottom.skip(slot.item)

    def message_at(self, slot: Slot, kind: Kind, tensors: Mapping[str, torch.Tensor], **scalars: str) -> Send:
        """Return the message at a slot."""
        return Send(SERVER, kind, slot.seq, version=slot.item.version, tensors=tensors, scalars=scalars)

    def forward(self, item: Item) -> torch.Tensor:
        """Return the smashed data (batch, *cut) of an item, computed with the bottom of its version."""
        training = item.purpose is Purpose.TRAIN and spec_of(self.config).trains_bottom
        smashed = self.bottom.forward(item, self.batches.inputs(item), self.batches.seed("bottom", item), training)
        if not is_finite(smashed):
            remedy = "lower optimizer.lr in a new run, or check the data."
            raise RunError(603, f"the activations of item {item.number} are not finite.", remedy)
        return smashed

    def apply_gradient(self, item: Item, gradient: torch.Tensor) -> None:
        """Apply the gradient (batch, *cut) for a training item."""
        seed, progress = self.batches.seed("bottom", item), self.batches.plan.progress(item)
        self.bottom.apply_gradient(item, self.batches.inputs(item), seed, gradient, progress)

    def final_bottom(self) -> dict[str, torch.Tensor]:
        """Return the parameters and buffers of the best model's bottom."""
        return self._candidates.get(self.best, self.bottom.weights(self.bottom.version))

    @override
    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"bottom": self.final_bottom(), "top": self.exported_top}

    def count_answer(self, slot: Slot, evaluated: int) -> None:
        """Count the answer to a slot; `evaluated` is the last epoch that it reports as evaluated."""
        # The candidate is kept here and not at sending: after a crash the answer may come before the message is sent
        # again.
        item = slot.item
        if item.evaluates and item.epoch not in self._candidates:
            self._candidates[item.epoch] = self.bottom.weights(item.version)
        self.record_answer(slot.seq, evaluated)
        self._candidates = {epoch: bottom for epoch, bottom in self._candidates.items() if self.is_candidate(epoch)}

    def _required_answer(self, slot: Slot) -> int:
        """Return the number of the answer that must be here before a message is sent; 0 for none."""
        if slot.half == "second":
            return self.sequence.seq_of_first(slot.item.number)
        settled = slot.item.number - self.batches.plan.window
        return self.sequence.completing_seq(settled) if settled >= 1 else 0

    def _oldest_version(self, seq: int) -> int:
        """Return the lowest version of the bottom that message `seq` or any later one needs.

        Versions never decrease among first halves, nor among second halves, and the two alternate: so the
        lowest version is one of the next two.
        """
        next_two = range(seq, min(seq + 2, self.sequence.last + 1))
        return min(self.sequence.slot(number).item.version for number in next_two)

    def _finish(self, top: Mapping[str, torch.Tensor]) -> list[Effect]:
        self.finished = True
        self.exported_top = {name: tensor.clone() for name, tensor in top.items()}
        return [Finish()]

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        if (oldest := self.oldest_seq(first_unconfirmed)) <= self.sequence.last:
            self.bottom.forget(below=self._oldest_version(oldest))
        base = super().snapshot(first_unconfirmed)
        tensors = {**self.bottom.state(), **flatten("exported_top", self.exported_top)}
        for epoch, bottom in self._candidates.items():
            tensors.update(flatten(f"candidate/{epoch}", bottom))
        return Snapshot(tensors, {**base.facts, "candidates": list(self._candidates)})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self.bottom.restore(snapshot.tensors)
        tensors = snapshot.tensors
        self.exported_top = under("exported_top", tensors)
        self._candidates = {epoch: under(f"candidate/{epoch}", tensors) for epoch in snapshot.facts["candidates"]}
