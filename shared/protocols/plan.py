"""What a site will send in a run, item by item: a pure function of its numbers of patients' samples.

Both sides hold the same plan, so an item is known by its number q = 1, 2, 3... alone:

    epoch 1: T T T A T T T A T | V V S      T training batch, A averaging of the bottoms,
    epoch 2: T T A T T T A T T | V V S      V validation batch, S test batch
                                ^ evaluation block, every `evaluate_every` epochs and at the end

The forward of item q uses the bottom that has applied the answers to all items up to
`version_of(q)`: a fixed lag of `window` items, whatever the timing (design.md section 5, rule 4).
All items of an evaluation block use one version, so that an evaluation judges one model.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cached_property

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.spec import spec_of


class Step(StrEnum):
    """What an item is for."""

    TRAIN = "train"
    AVERAGE = "average"
    VALIDATION = "validation"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a plan.

    Attributes:
        step: what it is for.
        epoch: 1, 2, 3...
        batch: number of the batch within the epoch and step, from 0; the number of the averaging over the run.
        batches: how many batches the epoch has for this step.
    """

    step: Step
    epoch: int
    batch: int
    batches: int

    @property
    def evaluates(self) -> bool:
        """Whether it belongs to an evaluation block."""
        return self.step in (Step.VALIDATION, Step.TEST)

    def rows(self, samples: int) -> range:
        """Positions of the batch's samples; batches of a part differ by at most one sample in size."""
        return range(samples * self.batch // self.batches, samples * (self.batch + 1) // self.batches)


_UNLIMITED = 2**62
_PHASES = (Step.TRAIN, Step.VALIDATION, Step.TEST)

Place = tuple[int, int, Fraction]
"""Where an item stands among the items of all sites: epoch, phase, share of the phase."""


@dataclass(frozen=True)
class Plan:
    """A site's items.

    Attributes:
        train, validation, test: number of samples.
        batch_size: largest batch.
        epochs: passes over the training samples.
        evaluate_every: epochs between evaluation blocks.
        average_every: training batches between averagings; None where bottoms are independent.
        window: items a site may have unanswered.
    """

    train: int
    validation: int
    test: int
    batch_size: int
    epochs: int
    evaluate_every: int
    average_every: int | None
    window: int

    @classmethod
    def of(cls, config: RunConfig, train: int, validation: int, test: int) -> Plan:
        """The plan of a site with these numbers of samples."""
        run = config.run
        frozen = spec_of(config).uploads_once
        return cls(
            train, validation, test, run.batch_size,
            epochs=1 if frozen else run.epochs,
            evaluate_every=run.evaluate_every,
            average_every=run.average_every if run.bottoms == "averaged" else None,
            # A frozen bottom is never answered, so nothing can hold its activations up.
            window=_UNLIMITED if frozen else run.window,
        )  # fmt: skip

    @property
    def most_items(self) -> int:
        """A bound on `last` that costs nothing to know."""
        return 2 * self.epochs * (self._batches(self.train) + self._batches(self.validation) + self._batches(self.test))

    def _batches(self, samples: int) -> int:
        return -(-samples // self.batch_size)

    def _evaluates(self, epoch: int) -> bool:
        return epoch % self.evaluate_every == 0 or epoch == self.epochs

    def _epoch_items(self, epoch: int) -> list[Item]:
        batches = self._batches(self.train)
        items = []
        for batch in range(batches):
            items.append(Item(Step.TRAIN, epoch, batch, batches))
            trained = (epoch - 1) * batches + batch + 1
            if self.average_every is not None and trained % self.average_every == 0:
                items.append(Item(Step.AVERAGE, epoch, trained // self.average_every, batches))
        if self._evaluates(epoch):
            for step, samples in ((Step.VALIDATION, self.validation), (Step.TEST, self.test)):
                count = self._batches(samples)
                items += [Item(step, epoch, batch, count) for batch in range(count)]
        return items

    @cached_property
    def _items(self) -> list[Item]:
        return [item for epoch in range(1, self.epochs + 1) for item in self._epoch_items(epoch)]

    @cached_property
    def last(self) -> int:
        """Number of the last item."""
        return len(self._items)

    def item(self, q: int) -> Item:
        """Item q, 1 <= q <= last."""
        return self._items[q - 1]

    def rows(self, q: int) -> range:
        """Positions of item q's samples in its part; empty for an averaging."""
        item = self.item(q)
        samples = {Step.TRAIN: self.train, Step.VALIDATION: self.validation, Step.TEST: self.test}
        return item.rows(samples.get(item.step, 0))

    @cached_property
    def _block_starts(self) -> list[int]:
        """First item of every evaluation block."""
        return [
            q for q, item in enumerate(self._items, 1)
            if item.evaluates and not (q > 1 and self._items[q - 2].evaluates)
        ]  # fmt: skip

    def version_of(self, q: int) -> int:
        """The bottom version that the forward of item q uses: a count of answered items."""
        if self.item(q).evaluates:
            q = self._block_starts[bisect_right(self._block_starts, q) - 1]
        return max(0, q - self.window)

    @property
    def averagings(self) -> int:
        """How many averagings the site takes part in."""
        return 0 if self.average_every is None else self.epochs * self._batches(self.train) // self.average_every

    def evaluated_epochs(self) -> list[int]:
        """Epochs that end in an evaluation block."""
        return [epoch for epoch in range(1, self.epochs + 1) if self._evaluates(epoch)]

    def place(self, q: int) -> Place:
        """Items of all sites in the order of their places form a fair schedule that timing cannot change.

        Sites go through an epoch in proportion to their sizes, and evaluate when all have trained.
        """
        item = self.item(q)
        if item.step is Step.AVERAGE:  # directly behind the batch that it follows
            return self.place(q - 1)
        return item.epoch, _PHASES.index(item.step), Fraction(item.batch + 1, item.batches)

    def ends_block(self, q: int) -> bool:
        """Whether item q is the last of an evaluation block."""
        return self.item(q).evaluates and (q == self.last or not self.item(q + 1).evaluates)
