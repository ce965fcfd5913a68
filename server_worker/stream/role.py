"""Server's side of the Stream shape: order, evaluation, averaging and the end. Protocols add `apply_item`."""

from abc import abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Self

import torch
from typing_extensions import override

from nightsplit.server_worker.aggregation import Aggregation
from nightsplit.server_worker.greeting import Samples
from nightsplit.server_worker.role import ServerRole
from nightsplit.server_worker.stream.bounds import BatchBounds
from nightsplit.server_worker.stream.ddp import Group
from nightsplit.server_worker.stream.schedule import SCHEDULES
from nightsplit.server_worker.stream.top import Top
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Record, Send
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.protocols.blocks import sequence_for
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.places import check_upload
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.stream import Slot, StreamSequence, weights
from nightsplit.shared.storage.checkpoint import Snapshot, flatten, under
from nightsplit.shared.wire.message import Header, Kind, Message, Scalar

ITEMS_MAX = 10_000_000
"""Largest number of items in a site's plan, so that message numbers stay below 2^26, as `Fair` needs it."""
REASON_LENGTH_MAX = 500
"""Largest number of characters of a refusal that are sent, since it may quote as much as a whole message."""


class StreamServer(ServerRole[StreamSequence]):
    """Base class of roles that hold the top, the server's layers, and answer each site's messages in order."""

    def __init__(self, config: RunConfig, top: Top, model: SplitModel) -> None:
        super().__init__(config, model.contract)
        self.top = top
        self.bounds = BatchBounds(config)
        self._schedule = SCHEDULES[config.run.order](config.run.sites)
        self.journalled = self._schedule.journalled or config.run.may_exclude
        length = 2 * config.run.window + 2
        self._answered_at: dict[str, deque[int]] = {site: deque(maxlen=length) for site in config.run.sites}
        """Number of steps at each of the latest answers, per site."""
        self._bottoms: dict[str, dict[str, torch.Tensor]] = {}
        """Bottoms to be averaged."""
        self._mean = {name: tensor.clone() for name, tensor in weights(model.parts.bottom).items()}
        """Bottom that all sites had at the latest averaging, or at the start."""
        self._waiting: dict[str, int] = {}
        """Sites that wait for the mean, with the number of the message that it answers."""
        self._averaged: Counter[str] = Counter()
        """Number of averagings that each site has taken part in."""
        self._tops: dict[int, dict[str, torch.Tensor]] = {}
        """Top at the latest report on each open epoch; an exclusion may complete its evaluation."""

    @classmethod
    def make(cls, config: RunConfig, model: SplitModel, state: Path, device: str, group: Group | None) -> Self:
        """Return the role of a server; arguments as of `nightsplit.server_worker.protocols.make_server_role`."""
        return cls(config, Top(model.parts.top, config.optimizer.of("top"), config.task, device), model)

    @abstractmethod
    def apply_item(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        """Apply a site's message about a batch; return its answer and metrics, or raise Refused without a change."""

    @override
    def choose(self, ready: Set[str]) -> str | None:
        return self._schedule.choose(ready, self._waiting.keys(), self.sequences, applied=self.active_sites)

    @override
    def on(self, message: Message) -> list[Effect]:
        if message.header.kind is Kind.HELLO:
            return self.handle_hello(message)
        site = message.header.sender
        slot = check_upload(message, self.sequences[site], self.config.task)
        handle = self._add_bottom if slot.item.purpose is Purpose.AVERAGE else self.apply_item
        effects = handle(site, slot, message)
        return effects + self._advance(site, slot.seq)

    @override
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        # The site is notified, and counts the item as one without a gradient.
        self.refusals[header.sender] += 1
        site, slot = header.sender, self.sequences[header.sender].slot(header.seq)
        scalars: dict[str, Scalar] = {"number": refusal.number, "reason": refusal.sentence[:REASON_LENGTH_MAX]}
        effects: list[Effect] = []
        # Other sites must not wait for a bottom or figures that were refused.
        if slot.completes_item and slot.item.ends_block:
            effects = self.close_block(site, slot.item)
        elif slot.completes_item and slot.item.purpose is Purpose.AVERAGE:
            self._averaged[site] += 1
            effects = self._average()
        return [self.answer(site, slot.seq, Kind.REFUSED, scalars=scalars), *effects, *self._advance(site, slot.seq)]

    @override
    def exclude(self, sender: str) -> list[Effect]:
        # The run averages, evaluates and ends without the site; its contribution stays.
        self._waiting.pop(sender, None)
        effects = self.drop_site(sender)
        if self._waiting:
            effects += self._average()
        return effects + self.end_if_done()

    # -- for the worker ----------------------------------------------------------------------------

    @override
    def weights(self) -> dict[str, torch.Tensor]:
        return self.top.weights()

    @override
    def weights_in(self, snapshot: Snapshot) -> dict[str, torch.Tensor]:
        return under("top", snapshot.tensors)

    @override
    def sequence_of(self, site: str, samples: Samples) -> StreamSequence:
        sequence = sequence_for(self.config, *samples)
        if sequence.plan.last > ITEMS_MAX:
            raise self.too_many(site, samples)
        return sequence

    @override
    def awaited(self) -> list[str]:
        if self.done:
            return self.unsigned
        return self._schedule.awaited(self._waiting.keys(), self.sequences, applied=self.active_sites)

    # -- used by the protocols -------------------------------------------------------------------

    def answer(
        self, site: str, seq: int, kind: Kind, tensors: Mapping[str, torch.Tensor] = {},
        scalars: Mapping[str, Scalar] = {},
    ) -> Send:  # fmt: skip
        """Return the answer to message `seq` of a site, with the progress on the epochs so far."""
        self.sent[site] = seq
        return Send(site, kind, seq, reply_to=seq, tensors=tensors, scalars={**scalars, **self.progress})

    def close_batch(self, site: str, loss: float | None) -> list[Effect]:
        """Count the outliers in an applied batch and return their metrics; the loss is None if it is unknown."""
        return self.record_outliers(site, self.bounds.close(site, loss))

    def progress_at(self, site: str, item: Item) -> Progress:
        """Return the progress of the top's training before a site's item: its own steps, and the epochs of that site.

        So the learning rate does not depend on sites that the server does not know yet, and every site's patients count
        the same, however late it comes.
        """
        return self.sequences[site].plan.progress(item)._replace(step=self.steps)

    def record_step(self, site: str, item: Item, loss: float | None) -> list[Effect]:
        """Count a training step and return its metrics; the loss is None where only the site knows it."""
        self.steps += 1
        self.count_item(site, item)
        # The site computed this batch with the bottom that it had after answer `base`; 0 is the initial one.
        base = self.sequences[site].completing_seq(item.version) if item.version else 0
        answered_at, later_answers = self._answered_at[site], self.applied[site] - base
        steps_at_base = answered_at[-1 - later_answers] if later_answers < len(answered_at) else 0
        facts: dict[str, Scalar] = {"event": "train", "step": self.steps, "site": site, "epoch": item.epoch}
        record = Record({**facts, "loss": loss, "staleness": self.steps - 1 - steps_at_base})
        return [record, *self.close_batch(site, loss)]

    def count_item(self, site: str, item: Item) -> None:
        """Count a training item as one that the top is trained on."""
        self.batches[site] += 1
        self.samples[site] += len(item.rows)

    def apply_report(self, site: str, item: Item, message: Message) -> list[Effect]:
        """Apply a report, which a site with a head sends in place of a gradient at the head.

        At the end of a block of held-out samples it has the block's figures. For a training item it says that the site
        could not use the head's input.
        """
        figures = self.read_figures(message, due=item.ends_block)
        effects: list[Effect] = []
        if item.ends_block:
            effects = self.close_evaluation(item.epoch, self.evaluation.report(site, item.epoch, figures))
        return [self.answer(site, message.header.seq, Kind.NOTED), *effects]

    def close_block(self, site: str, item: Item) -> list[Effect]:
        """Measure a site's block, of which `item` is the last."""
        return self.close_evaluation(item.epoch, self.evaluation.close(site, item.epoch))

    def close_evaluation(self, epoch: int, evaluated: bool) -> list[Effect]:
        """Describe an epoch after a site's block if it is evaluated by all sites now, and keep the best model."""
        self._tops.pop(epoch, None)
        if evaluated:
            return self.describe_candidate(epoch)
        if self.config.run.may_exclude:
            self._tops[epoch] = self.top.weights()
        return []

    @override
    def describe_candidate(self, epoch: int) -> list[Effect]:
        top = self._tops.pop(epoch, None)
        if self.evaluation.best == epoch:
            self.best_weights = top or self.top.weights()
        return super().describe_candidate(epoch)

    # -- averaging, end ----------------------------------------------------------------------------

    def _add_bottom(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        """Add a site's bottom; after its last message about the averaging the site waits for the mean."""
        if message.header.kind is Kind.BOTTOM:
            self._bottoms[site] = {name: tensor.clone() for name, tensor in message.tensors.items()}
        if not slot.completes_item:
            return [self.answer(site, slot.seq, Kind.NOTED)]
        self._averaged[site] += 1
        self._waiting[site] = slot.seq
        return self._average()

    def _average(self) -> list[Effect]:
        """Answer with the mean of the bottoms when all active sites have sent theirs.

        Sites without such an averaging in their plan, or with a refused bottom, have no part in the mean.
        """
        number = max(self._averaged.values())
        if not self.active_sites.keys() <= self.sequences.keys():
            return []  # without its hello, the plan of a site is unknown
        partners = [site for site in self.active_sites if self.sequences[site].plan.averagings >= number]
        return self._send_mean() if all(self._averaged[site] >= number for site in partners) else []

    def _send_mean(self) -> list[Effect]:
        """Answer the waiting sites with the mean of their bottoms; from three sites on it is the geometric median."""
        aggregation = Aggregation(self.config.round)
        sites = [site for site in self.config.run.sites if site in self._bottoms]
        for site in sites:
            changes = [(self._bottoms[site][name] - mean).reshape(-1) for name, mean in self._mean.items()]
            aggregation.add(site, changes, self.sequences[site].plan.train)
        if sites:
            pairs = zip(self._mean.items(), aggregation.result(), strict=True)
            self._mean = {name: mean + change.view_as(mean) for (name, mean), change in pairs}
        kind, mean = (Kind.AVERAGE, self._mean) if sites else (Kind.NOTED, {})
        effects: list[Effect] = [self.answer(site, seq, kind, mean) for site, seq in self._waiting.items()]
        for site, factor in aggregation.outliers().items():
            effects += self.record_outliers(site, {"bottom": factor})
        self._bottoms.clear()
        self._waiting.clear()
        return effects

    def _advance(self, site: str, seq: int) -> list[Effect]:
        """Count a message as applied, and end the run after the last one."""
        self.applied[site] = seq
        self._answered_at[site].append(self.steps)
        return self.end_if_done()

    @override
    def end_if_done(self) -> list[Effect]:
        if self.done:
            return [] if self.unsigned else self.complete()
        if not self.evaluation.exhausted:
            return []
        # The farewell comes after the answers to all applied messages.
        return [*(self._send_mean() if self._waiting else []), *self.end()]

    def complete(self) -> list[Effect]:
        """Go on after the last message of every site was applied, and its log is signed."""
        return self.end()

    @override
    def farewell(self) -> list[Send]:
        tensors = {}
        if self.config.run.export_top:
            tensors = {name: self.best_weights[name] for name in weights(self.top.module)}
        return [
            self.answer(site, self.farewell_seq(site), Kind.FINISH, tensors, {"summary": self.summary})
            for site in self.active_sites
        ]

    def farewell_seq(self, site: str) -> int:
        """Return the number of the last message to a site, one after its last answer."""
        return self.applied[site] + 1

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        tensors = {**base.tensors, **self.top.state(), **flatten("bounds", self.bounds.state())}
        if self.config.run.bottoms == "averaged":
            tensors.update(flatten("mean", self._mean))
        for site, bottom in self._bottoms.items():
            tensors.update(flatten(f"bottom/{site}", bottom))
        for epoch, top in self._tops.items():
            tensors.update(flatten(f"open_top/{epoch}", top))
        facts: dict[str, Any] = {
            "answered_at": {site: list(steps) for site, steps in self._answered_at.items()},
            "bottoms": list(self._bottoms), "waiting": dict(self._waiting), "averaged": dict(self._averaged),
            "open_tops": list(self._tops),
        }  # fmt: skip
        return Snapshot(tensors, {**base.facts, **facts})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        tensors, facts = snapshot.tensors, snapshot.facts
        self.top.restore(tensors)
        self.bounds.restore(under("bounds", tensors))
        for site, steps in facts["answered_at"].items():
            self._answered_at[site].extend(steps)
        self._mean = under("mean", tensors) or self._mean
        self._bottoms = {site: under(f"bottom/{site}", tensors) for site in facts["bottoms"]}
        self._waiting = facts["waiting"]
        self._averaged = Counter(facts["averaged"])
        self._tops = {epoch: under(f"open_top/{epoch}", tensors) for epoch in facts["open_tops"]}
