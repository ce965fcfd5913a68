"""Plan of a site's items in a run: a pure function of its numbers of patients' samples.

Both sides hold the same plan, so that the number 1, 2, 3... of an item identifies it:

    epoch 1: T T T A T T T A T | V V S      T training batch, A averaging of the bottoms,
    epoch 2: T T A T T T A T T | V V S      V validation batch, S test batch
                                ^ evaluation block, every `evaluate_every` epochs and at the end

The forward of an item uses the bottom that has applied the answers to all items up to
`Item.version`: a fixed lag of `window` items, whatever the timing. All items of an evaluation
block use one version, so that an evaluation is about one model.

Items are computed on demand: a plan takes no more memory or time for ten million items than for ten,
so that no site's numbers can exhaust the server.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.protocols.spec import spec_of


class Purpose(StrEnum):
    """Purpose of an item."""

    TRAIN = "train"
    AVERAGE = "average"
    VALIDATION = "validation"
    TEST = "test"


Place = tuple[int, int, Fraction]
"""Position of an item among the items of all sites: epoch, phase, share of the phase."""

_PHASES = {Purpose.TRAIN: 0, Purpose.AVERAGE: 0, Purpose.VALIDATION: 1, Purpose.TEST: 2}
_UNLIMITED = 2**62


@dataclass(frozen=True, slots=True)
class Item:
    """Item of a plan.

    Attributes:
        number: 1, 2, 3... in the plan.
        epoch: 1, 2, 3...
        batch: number of the batch within the epoch and purpose, from 0; of an averaging, the batch before it.
        batches: number of the epoch's batches of this purpose.
        rows: positions of the batch's samples in its part; empty for an averaging.
        version: version of the bottom that its forward uses, or that is averaged: a count of answered items.
        ends_block: whether it is the last of an evaluation block.
    """

    number: int
    purpose: Purpose
    epoch: int
    batch: int
    batches: int
    rows: range
    version: int
    ends_block: bool = False

    @property
    def evaluates(self) -> bool:
        """True if it belongs to an evaluation block."""
        return self.purpose in (Purpose.VALIDATION, Purpose.TEST)

    @property
    def place(self) -> Place:
        """Position in the fair schedule of all sites, which does not depend on timing.

        Sites progress through an epoch in proportion to their sizes, and evaluate when all have trained. An
        averaging comes directly after its batch.
        """
        return self.epoch, _PHASES[self.purpose], Fraction(self.batch + 1, self.batches)


@dataclass(frozen=True)
class Plan:
    """Plan of a site's items.

    Attributes:
        train, validation, test: number of samples.
        batch_size: smallest number of samples of a batch; a part with fewer is one batch.
        epochs: passes over the training samples.
        evaluate_every: epochs between evaluation blocks.
        average_every: training batches between averagings; None for independent bottoms.
        window: items a site may have unanswered.
        uploads_once: whether no item is answered.
    """

    train: int
    validation: int
    test: int
    batch_size: int
    epochs: int
    evaluate_every: int
    average_every: int | None
    window: int
    uploads_once: bool = False

    @classmethod
    def of(cls, config: RunConfig, train: int, validation: int, test: int) -> Plan:
        """Return the plan of a site with these numbers of samples."""
        run = config.run
        frozen = spec_of(config).uploads_once
        return cls(
            train, validation, test, run.batch_size,
            epochs=1 if frozen else run.epochs,
            evaluate_every=run.evaluate_every,
            average_every=run.average_every if run.bottoms == "averaged" else None,
            window=_UNLIMITED if frozen else run.window,  # no item waits for an answer
            uploads_once=frozen,
        )  # fmt: skip

    @property
    def last(self) -> int:
        """Number of the last item."""
        return self.end(self.epochs)

    @property
    def averagings(self) -> int:
        """Number of averagings of the site."""
        return self.averagings_until(self.epochs)

    @property
    def unanswered(self) -> int:
        """Largest number of items that a site may send before the first answer."""
        return min(self.last, self.window)

    def end(self, epoch: int) -> int:
        """Return the number of the last item of an epoch, 0 <= epoch <= epochs."""
        blocks = evaluations(epoch, self.epochs, self.evaluate_every)
        block = self.batches(self.validation) + self.batches(self.test)
        return epoch * self.batches(self.train) + self.averagings_until(epoch) + blocks * block

    def epoch_of(self, number: int) -> int:
        """Return the epoch of item `number`, 1 <= number <= last."""
        return bisect_left(range(1, self.epochs + 1), number, key=self.end) + 1

    def progress(self, item: Item) -> Progress:
        """Return the progress of a training at this site before a training item: one step per training item."""
        done = (item.epoch - 1) * item.batches + item.batch
        return Progress(done, done, self.epochs * item.batches)

    def item(self, number: int) -> Item:
        """Return item `number`, 1 <= number <= last."""
        epoch = self.epoch_of(number)
        batches = self.batches(self.train)
        earlier = (epoch - 1) * batches  # training batches of the epochs before
        # Index among the training batches and averagings of all epochs.
        index = earlier + self.averagings_until(epoch - 1) + number - self.end(epoch - 1) - 1
        in_block = index - epoch * batches - self.averagings_until(epoch)
        if in_block >= 0:
            return self.held_out(number, epoch, in_block)
        version = max(0, number - self.window)
        every = self.average_every or _UNLIMITED
        groups, offset = divmod(index, every + 1)  # a group is `every` batches and an averaging
        batch = groups * every + offset - earlier
        if offset == every:
            return Item(number, Purpose.AVERAGE, epoch, batch - 1, batches, range(0), version)
        return Item(number, Purpose.TRAIN, epoch, batch, batches, rows_of(self.train, batch, batches), version)

    def held_out(self, number: int, epoch: int, offset: int) -> Item:
        """Return the item at an offset, from 0, in an epoch's evaluation block."""
        validation, test = self.batches(self.validation), self.batches(self.test)
        version = max(0, number - offset - self.window)  # the same for the whole block
        ends_block = offset == validation + test - 1
        if offset < validation:
            rows = rows_of(self.validation, offset, validation)
            return Item(number, Purpose.VALIDATION, epoch, offset, validation, rows, version, ends_block)
        batch = offset - validation
        return Item(number, Purpose.TEST, epoch, batch, test, rows_of(self.test, batch, test), version, ends_block)

    def batches(self, samples: int) -> int:
        """Return the number of batches. A remainder is spread: a message of few patients would reveal much of each."""
        return max(samples // self.batch_size, min(samples, 1))

    def averagings_until(self, epochs: int) -> int:
        """Return the number of averagings in the first epochs."""
        return 0 if self.average_every is None else epochs * self.batches(self.train) // self.average_every


def evaluations(epoch: int, epochs: int, every: int) -> int:
    """Return the number of evaluation blocks up to the end of an epoch: one per `every` epochs, and one at the end."""
    return epoch // every + (epoch == epochs and epoch % every > 0)


def rows_of(samples: int, batch: int, batches: int) -> range:
    """Return the rows of a batch; batches of a part differ by at most one sample in size."""
    return range(samples * batch // batches, samples * (batch + 1) // batches)
