"""The server's side of a run that learns by targets (docs/explanation/nights.md).

A site's block is stored as it arrives. When its last training message is applied, the server's layers are fitted to the
block, a step at a time, and then its messages are answered with the displacements of their activations. Meanwhile no
other message is applied, so that the result depends on the order of messages alone. No site waits for another one.
"""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from typing_extensions import override

from nightsplit.server_worker.stream.activation_store import ActivationStore
from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.server_worker.stream.top import Top
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Record, Send
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.block_fit import BlockFit, Unit
from nightsplit.shared.learning.displacement import Sums
from nightsplit.shared.protocols.blocks import BlockPlan
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.plan import Item
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import Header, Kind, Message

TOP = "top"
"""Part of a fit of the server's layers."""

Spent = list[tuple[str, int]]
"""Items of finished fits, by site and number."""


class BlockServer(StreamServer):
    """Base class of roles that fit the server's layers to a block at a time."""

    knows_loss: ClassVar[bool] = False
    """True if the loss of a fit is the task's own."""

    def __init__(self, config: RunConfig, top: Top, model: SplitModel, state: Path) -> None:
        super().__init__(config, top, model)
        self.store = ActivationStore(state / "activations")
        self._collected: dict[str, list[int]] = {site: [] for site in config.run.sites}
        """Items of each site's open block that have come whole."""
        self._held: dict[str, list[Send]] = {site: [] for site in config.run.sites}
        """Answers to other messages of the open blocks, so that a site's answers leave in their order."""
        self._fit: BlockFit | None = None
        self._spent: Spent = []
        self._spent_before: list[Spent] = []
        """Likewise before each of the last two snapshots, for a kept checkpoint may need them."""

    @abstractmethod
    def fit(self, item: Item, site: str, unit: Unit) -> float:
        """Perform a training step of a fit and return its loss; Refused 312 without a change."""

    @abstractmethod
    def measure(self, item: Item, site: str) -> Sums:
        """Return the sums of a batch for the length of its block's displacements."""

    @abstractmethod
    def displace(self, item: Item, site: str, step: float) -> torch.Tensor:
        """Return the displacement (batch, *cut) of a batch."""

    @property
    @override
    def busy(self) -> bool:
        return self._fit is not None

    @override
    def on(self, message: Message) -> list[Effect]:
        site = message.header.sender
        follows, sent = bool(self._collected[site]), self.sent[site]
        effects = super().on(message)
        return self._hold(site, sent, effects) if follows and message.header.seq else effects

    @override
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        follows, sent = bool(self._collected[header.sender]), self.sent[header.sender]
        effects = super().refused(header, refusal)
        self._spent.append((header.sender, self.sequences[header.sender].slot(header.seq).item.number))
        return self._hold(header.sender, sent, effects) if follows else effects

    def _hold(self, site: str, sent: int, effects: list[Effect]) -> list[Effect]:
        """Keep back an answer to a site that waits for the answers to earlier messages; return the other effects."""
        answers = [effect for effect in effects if isinstance(effect, Send) and effect.receiver == site]
        self._held[site] += answers
        self.sent[site] = sent
        return [effect for effect in effects if effect not in answers]

    def _due(self, site: str, below: int) -> list[Effect]:
        """Return the answers that were kept back, those with numbers below another one's."""
        due = [answer for answer in self._held[site] if answer.seq < below]
        self._held[site] = self._held[site][len(due) :]
        if due:
            self.sent[site] = due[-1].seq
        return list(due)

    def collect(self, site: str, slot: Slot) -> None:
        """Count a training batch as one that its block's fit uses, and that is answered after it."""
        self._collected[site].append(slot.item.number)
        self.count_item(site, slot.item)

    @override
    def next(self) -> list[Effect]:
        fit = self._fit
        if fit is None:
            return super().next()
        unit = fit.unit(self.config.run.seed)
        if unit is None:
            self._fit = None
            self._spent += [(fit.site, q) for q in fit.items]
            answers = self._due(fit.site, self.applied[fit.site] + 1)
            return [*answers, Record({"event": "local", "step": self.steps}), *self.end_if_done()]
        item, site = self.sequences[fit.site].plan.item(unit.item), fit.site
        effects: list[Effect] = []
        sums = None
        if unit.phase == "train":
            effects = self._train(item, site, unit)
        elif unit.phase == "measure":
            sums = self.measure(item, site)
            effects = [Record({"event": "local", "step": self.steps})]
        else:
            displacement = self.displace(item, site, fit.sums.step)
            seq = self.sequences[site].completing_seq(item.number)
            effects = self._due(site, seq)
            effects.append(self.answer(site, seq, Kind.CUT_TARGET, {"displacement": displacement}))
        self._fit = fit.advanced(sums)
        return effects

    def _train(self, item: Item, site: str, unit: Unit) -> list[Effect]:
        try:
            loss = self.fit(item, site, unit)
        except Refused:
            self.refusals[site] += 1
            self.bounds.close(site, None)
            return [Record({"event": "local", "step": self.steps})]
        self.steps += 1
        record = Record({"event": "train", "step": self.steps, "site": site, "epoch": item.epoch, "loss": loss})
        return [record, *self.close_batch(site, loss if self.knows_loss else None)]

    @override
    def _advance(self, site: str, seq: int) -> list[Effect]:
        self._begin_fit(site, seq)
        return super()._advance(site, seq)

    def _begin_fit(self, site: str, seq: int) -> None:
        """Begin the fit of a block with its last training message."""
        slot, plan = self.sequences[site].slot(seq), self.sequences[site].plan
        assert isinstance(plan, BlockPlan)
        if slot.completes_item and plan.ends_training(slot.item) and self._collected[site]:
            items, block = tuple(self._collected[site]), plan.block_of(slot.item.number)
            self._fit = BlockFit(TOP, site, block, items, self.config.run.passes, answers=True)
            self._collected[site] = []

    @override
    def end_if_done(self) -> list[Effect]:
        return [] if self.busy else super().end_if_done()

    @override
    def exclude(self, sender: str) -> list[Effect]:
        self._spent += [(sender, q) for q in self.store.items(sender)]
        self._collected[sender], self._held[sender] = [], []
        return super().exclude(sender)

    def forget(self, site: str, q: int) -> None:
        """Remove a stored batch."""
        self.store.remove(site, q)

    @override
    def saved(self) -> list[Effect]:
        # The checkpoint before the last one is kept, too, and may be in the middle of the fit.
        for spent in self._spent_before[:-1]:
            for site, q in spent:
                self.forget(site, q)
        self._spent_before = self._spent_before[-1:]
        return super().saved()

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        self._spent_before.append(self._spent)
        self._spent = []
        facts = {
            "collected": {site: list(items) for site, items in self._collected.items()},
            "held": {
                site: [[answer.seq, answer.kind, dict(answer.scalars)] for answer in answers]
                for site, answers in self._held.items()
            },
            "fit": self._fit and self._fit.facts(),
            "spent": [list(entry) for spent in self._spent_before for entry in spent],
        }
        return Snapshot(base.tensors, {**base.facts, **facts})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        facts = snapshot.facts
        self._collected = {site: list(items) for site, items in facts["collected"].items()}
        self._held = {
            site: [Send(site, Kind(kind), seq, reply_to=seq, scalars=scalars) for seq, kind, scalars in answers]
            for site, answers in facts["held"].items()
        }
        self._fit = facts["fit"] and BlockFit.of(facts["fit"], self.config.run.passes)
        self._spent_before = [[(site, q) for site, q in facts["spent"]]]
