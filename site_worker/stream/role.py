"""The site's side of the Stream shape: what is sent when, and what becomes of the answers."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Self

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Finish, Send
from nightsplit.shared.errors import Refused, RunError
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.places import check_answer, check_farewell
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.protocols.stream import Slot, StreamSequence, weights
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.codecs import is_finite
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.stream.batches import StreamBatches
from nightsplit.site_worker.stream.bottom import Bottom


class StreamSite(SiteRole):
    """Sends its plan item by item, as far ahead of the answers as the window allows.

    Args:
        name: the site.
        config: the run, as the site's own run.toml has it.
        bottom: the site's layers.
        batches: the site's batches.
        contract: payload of each kind.
        incarnation: of this process; a rejection of an earlier one is ignored.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        bottom: Bottom,
        batches: StreamBatches,
        contract: Mapping[Kind, Payload],
        incarnation: str,
    ) -> None:
        super().__init__(name, config, contract, incarnation)
        self.bottom = bottom
        self.batches = batches
        self.sequence = StreamSequence(batches.plan, has_head=Kind.HEAD_INPUT in contract)
        self.exported_top: dict[str, torch.Tensor] = {}
        """The server's half of the best model, where the run exports it."""
        self._candidates: dict[int, dict[str, torch.Tensor]] = {}
        """The bottom that each epoch was evaluated with, while that epoch may still be the best."""

    @classmethod
    def make(
        cls, name: str, config: RunConfig, model: SplitModel, splits: Splits, incarnation: str, device: str
    ) -> Self:
        """Make the role of a site with this data (scaled), whose layers compute on `device`."""
        bottom = Bottom(model.parts.bottom, config.optimizer, device)
        return cls(name, config, bottom, StreamBatches(config, name, splits), model.contract, incarnation)

    # -- what a system fills in ------------------------------------------------------------------

    @abstractmethod
    def content(self, item: Item) -> Send:
        """The message that carries the first half of a batch's item."""

    def second(self, item: Item) -> Send:
        """The message that carries the second half of an item, in a system with a head."""
        raise NotImplementedError

    @abstractmethod
    def take(self, item: Item, message: Message) -> None:
        """Apply an answer about a batch's item that carries tensors.

        Raises:
            Refused: it cannot be applied; nothing was changed.
        """

    # -- Role ------------------------------------------------------------------------------------

    @property
    def planned(self) -> int:
        """See `SiteRole`."""
        return self.sequence.last

    @property
    def samples(self) -> tuple[int, int, int]:
        """See `SiteRole`."""
        return self.batches.plan.train, self.batches.plan.validation, self.batches.plan.test

    def next(self) -> list[Effect]:
        """The next message of the plan, when the answers that it depends on are here."""
        if not self.at_work:
            return []
        if self.next_seq > self.sequence.last:
            # The farewell that was here could not be used, and there is nothing else to wait for.
            return self._finish({}) if self.answered == self.sequence.answers else []
        slot = self.sequence.slot(self.next_seq)
        if self.answered < self._needs(slot):
            return []
        item = slot.item
        if slot.half == "second":
            send = self.second(item)
        elif item.purpose is Purpose.AVERAGE:
            bottom = self.bottom.weights(item.version)
            send = self.send(item, Kind.BOTTOM, {name: bottom[name].cpu() for name in weights(self.bottom.module)})
        else:
            send = self.content(item)
        self.next_seq += 1
        return [send]

    def answer(self, message: Message) -> list[Effect]:
        """See `SiteRole`."""
        kind, scalars = message.header.kind, message.scalars
        if kind is Kind.FINISH:
            check_farewell(message, self.sequence, self.config.run)
            self.best = int(scalars["best"])
            return self._finish(message.tensors)
        slot = check_answer(message, self.sequence, self.config.run)
        if kind is Kind.AVERAGE:
            self.bottom.merge(slot.item.version, message.tensors)
        elif kind in (Kind.NOTED, Kind.REFUSED):
            if slot.settles:
                self.bottom.skip_checkpoint(slot.item)
        else:
            self.take(slot.item, message)
        self.best = int(scalars["best"])
        self.count_answer(slot, int(scalars["judged"]))
        return []

    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        """See `Role`: an answer that cannot be used counts as one without a gradient."""
        if header.seq >= self.sequence.answers:
            self.record_answer(header.seq, 0)
            return []
        slot = self.sequence.slot(header.seq)
        if slot.settles:
            self.bottom.skip_checkpoint(slot.item)
        self.count_answer(slot, 0)
        return []

    # -- parts that systems use --------------------------------------------------------------------

    def send(self, item: Item, kind: Kind, tensors: Mapping[str, torch.Tensor], **scalars: str) -> Send:
        """A message about an item, as the next in the sequence."""
        return Send(SERVER, kind, self.next_seq, version=item.version, tensors=tensors, scalars=scalars)

    def forward(self, item: Item) -> torch.Tensor:
        """Smashed data (batch, *cut) of an item, by the version that its place in the plan fixes."""
        training = item.purpose is Purpose.TRAIN and spec_of(self.config).trains_bottom
        smashed = self.bottom.forward(item, self.batches.inputs(item), self.batches.seed("bottom", item), training)
        if not is_finite(smashed):
            raise RunError(
                603,
                f"the activations of item {item.number} are not finite.",
                "lower optimizer.lr in a new run, or check the data.",
            )
        return smashed

    def apply_gradient(self, item: Item, gradient: torch.Tensor) -> None:
        """Apply the gradient (batch, *cut) that answers a training item."""
        self.bottom.apply_gradient(item, self.batches.inputs(item), self.batches.seed("bottom", item), gradient)

    def final_bottom(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the bottom that belongs to the best model."""
        return self._candidates.get(self.best, self.bottom.weights(self.bottom.version))

    def model(self) -> dict[str, dict[str, torch.Tensor]]:
        """See `SiteRole`."""
        return {"bottom": self.final_bottom(), "top": self.exported_top}

    # -- inside ------------------------------------------------------------------------------------

    def _needs(self, slot: Slot) -> int:
        """Number of the answer without which a message cannot be made."""
        if slot.half == "second":
            return self.sequence.seq_of_first(slot.item.number)
        behind = slot.item.number - self.batches.plan.window
        return self.sequence.settles(behind) if behind >= 1 else 0

    def _oldest_version(self, seq: int) -> int:
        """The lowest version that message `seq` or a later one is about."""
        following = range(seq, min(seq + 2, self.sequence.last + 1))
        return min(self.sequence.slot(number).item.version for number in following)

    def count_answer(self, slot: Slot, judged: int) -> None:
        """Count the message about a slot as applied, whatever it was."""
        # Not when it is sent: after a crash the answer may be here before it would be sent again.
        item = slot.item
        if item.evaluates and item.epoch not in self._candidates:
            self._candidates[item.epoch] = self.bottom.weights(item.version)
        self.record_answer(slot.seq, judged)
        self._candidates = {epoch: kept for epoch, kept in self._candidates.items() if self.open_candidate(epoch)}

    def _finish(self, top: Mapping[str, torch.Tensor]) -> list[Effect]:
        self.finished = True
        self.exported_top = {name: tensor.clone() for name, tensor in top.items()}
        return [Finish()]

    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        """See `Role`. What no later snapshot can need is forgotten here."""
        oldest = min(self.resume(first_unconfirmed), self.answered + 1)
        if oldest <= self.sequence.last:
            self.bottom.forget(below=self._oldest_version(oldest))
        base = super().snapshot(first_unconfirmed)
        tensors = {**self.bottom.state(), **flatten("exported_top", self.exported_top)}
        for epoch, kept in self._candidates.items():
            tensors.update(flatten(f"candidate/{epoch}", kept))
        return Snapshot(tensors, {**base.facts, "candidates": list(self._candidates)})

    def restore(self, snapshot: Snapshot) -> None:
        """See `Role`."""
        super().restore(snapshot)
        self.bottom.restore(snapshot.tensors)
        tensors = snapshot.tensors
        self.exported_top = under("exported_top", tensors)
        self._candidates = {epoch: under(f"candidate/{epoch}", tensors) for epoch in snapshot.facts["candidates"]}
