"""split_frozen: Ha et al. (IEEE Access 2021) with the site's layer detached in time.

Sites release the activations of a bottom that is never trained, once, and may then leave for good.
The server stores them, and when all have arrived it trains on them for any number of epochs,
while no site is online. No gradient returns.
"""

import statistics
from pathlib import Path
from typing import Self

import torch
from typing_extensions import override

from nightsplit.server_worker.stream.activation_store import ActivationStore, Row
from nightsplit.server_worker.stream.bounds import root_mean_square, scaled_parts
from nightsplit.server_worker.stream.ddp import DividedTop, Group
from nightsplit.server_worker.stream.role import StreamServer
from nightsplit.server_worker.stream.schedule import Fair
from nightsplit.server_worker.stream.top import StoredTop
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Record
from nightsplit.shared.errors import Refused
from nightsplit.shared.learning.bounds import factor_for, reference
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.build import SplitModel
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.protocols.stream import Slot
from nightsplit.shared.storage.checkpoint import Snapshot
from nightsplit.shared.wire.message import Header, Message


class SplitFrozenServer(StreamServer):
    """Server role of split_frozen, which collects activations first and trains afterwards."""

    top: StoredTop

    def __init__(self, config: RunConfig, top: StoredTop, model: SplitModel) -> None:
        super().__init__(config, top, model)
        self._schedule = Fair(config.run.sites)  # the order of arrival does not matter
        self.journalled = config.run.may_exclude  # the position of an exclusion does
        self._rows: dict[str, dict[int, int]] = {site: {} for site in config.run.sites}
        """Number of stored samples per site and item."""
        self._parts = scaled_parts(config.task)
        self._sizes: dict[str, dict[str, dict[int, float]]] = {part: {} for part in self._parts.values()}
        """Root mean square of each training item as it was sent, by part, site and number."""
        self._left_out: set[tuple[str, int]] = set()
        """Items that nothing is trained on, since their targets are outliers."""
        self._training: list[Row] = []
        """All training samples, once all are stored."""
        self._trained = 0
        """Number of batches trained on."""

    @classmethod
    @override
    def make(cls, config: RunConfig, model: SplitModel, state: Path, device: str, group: Group | None) -> Self:
        store = ActivationStore(state / "activations")
        parts = model.parts.top, config.optimizer.of("top"), config.task
        top = StoredTop(*parts, device, store) if group is None else DividedTop(*parts, store, group)
        return cls(config, top, model)

    @override
    def help(self) -> None:
        assert isinstance(self.top, DividedTop)
        self.top.help()

    @override
    def apply_item(self, site: str, slot: Slot, message: Message) -> list[Effect]:
        item = slot.item
        self.top.store.put(site, item.number, message.tensors)
        self._rows[site][item.number] = len(item.rows)
        if item.purpose is Purpose.TRAIN:
            self.count_item(site, item)
            for name, part in self._parts.items():
                self._sizes[part].setdefault(site, {})[item.number] = root_mean_square(message.tensors[name])
        return []  # no answer

    @override
    def refused(self, header: Header, refusal: Refused) -> list[Effect]:
        self.refusals[header.sender] += 1  # for the report; the site gets no answer
        return self._advance(header.sender, header.seq)

    @override
    def share(self, site: str) -> float:
        # Of samples and not of batches, since every step draws from all stored samples.
        return self.samples[site] / max(1, self.samples.total())

    @override
    def complete(self) -> list[Effect]:
        return []  # `next` trains

    @override
    def farewell_seq(self, site: str) -> int:
        return 1  # a site gets no other message

    @override
    def next(self) -> list[Effect]:
        """Perform one training step on stored activations, with the evaluation and the end after an epoch."""
        if not self.done or self.unsigned:
            return []
        effects: list[Effect] = []
        if not self._training:
            effects = self._scale_outliers()
            self._training = self._training_rows()
        rows = self._training
        per_epoch = -(-len(rows) // self.config.run.batch_size)
        epoch, batch = divmod(self._trained, per_epoch)
        generator = torch.Generator().manual_seed(seed_for(self.config.run.seed, "store", epoch + 1))
        order = torch.randperm(len(rows), generator=generator)
        batch_rows = order[len(rows) * batch // per_epoch : len(rows) * (batch + 1) // per_epoch].tolist()
        seed = seed_for(self.config.run.seed, "top", "store", self._trained)
        try:
            progress = Progress(self.steps, self._trained, per_epoch * self.config.run.epochs)
            loss = self.top.train_stored([rows[i] for i in batch_rows], seed, progress)
        except Refused:
            self.refusals["store"] += 1
        else:
            self.steps += 1
            effects.append(Record({"event": "train", "step": self.steps, "epoch": epoch + 1, "loss": loss}))
        self._trained += 1
        if batch + 1 == per_epoch:
            effects += self._evaluate(epoch + 1)
            if epoch + 1 == self.config.run.epochs or self.evaluation.exhausted:
                effects += self.end()
        return effects

    def _scale_outliers(self) -> list[Effect]:
        """Scale outliers among stored activations to the usual size, leave out those of targets; return their metrics.

        The usual size is the median over the sites of each one's median. A repetition after a crash changes nothing:
        what was scaled before is no outlier any more.
        """
        effects: list[Effect] = []
        for name, part in self._parts.items():
            median = reference([statistics.median(sizes.values()) for sizes in self._sizes[part].values()])
            for site, sizes in self._sizes[part].items():
                for q, size in sizes.items():
                    factor = factor_for(size, median)
                    if factor == 1.0:
                        continue
                    if not self._trained:
                        effects += self.record_outliers(site, {part: factor})
                    if name == "targets":
                        self._left_out.add((site, q))
                        continue
                    stored = self.top.store.get(site, q)
                    factor = factor_for(root_mean_square(stored[name]), median)
                    self.top.store.put(site, q, {**stored, name: stored[name] * factor})
        return effects

    def _training_rows(self) -> list[Row]:
        return [
            (site, q, row)
            for site in self.config.run.sites
            for q, rows in sorted(self._rows[site].items())
            if self.sequences[site].plan.item(q).purpose is Purpose.TRAIN and (site, q) not in self._left_out
            for row in range(rows)
        ]

    def _evaluate(self, epoch: int) -> list[Effect]:
        if epoch % self.config.run.evaluate_every and epoch != self.config.run.epochs:
            return []
        evaluated = False
        for site in self.active_sites:
            for q in sorted(self._rows[site]):
                part = self.sequences[site].plan.item(q).purpose
                if part is not Purpose.TRAIN:
                    stored = self.top.store.get(site, q)
                    try:
                        outputs = self.top.predict(stored["smashed"])
                    except Refused:
                        self.refusals[site] += 1
                    else:
                        self.evaluation.add(site, part, outputs, stored["targets"])
            evaluated = self.evaluation.close(site, epoch)
        return self.close_evaluation(epoch, evaluated)

    @override
    def snapshot(self, first_unconfirmed: int | None) -> Snapshot:
        base = super().snapshot(first_unconfirmed)
        rows = {site: {str(q): n for q, n in items.items()} for site, items in self._rows.items()}
        sizes = {
            part: {site: {str(q): size for q, size in items.items()} for site, items in sites.items()}
            for part, sites in self._sizes.items()
        }
        return Snapshot(base.tensors, {**base.facts, "rows": rows, "sizes": sizes, "trained": self._trained})

    @override
    def restore(self, snapshot: Snapshot) -> None:
        super().restore(snapshot)
        self._trained = snapshot.facts["trained"]
        self._rows = {s: {int(q): n for q, n in items.items()} for s, items in snapshot.facts["rows"].items()}
        self._sizes = {
            part: {site: {int(q): size for q, size in items.items()} for site, items in sites.items()}
            for part, sites in snapshot.facts["sizes"].items()
        }


ROLE = SplitFrozenServer
