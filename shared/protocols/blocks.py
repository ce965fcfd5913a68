"""Plan and sequence of a site that learns by targets: by night, not by item.

    night       1      2            3            ...  n            n + 1
    split_u     F(1)   S(1) F(2)    S(2) F(3)         S(n-1) F(n)  S(n)     F(b) first halves of block b, S(b) second
    split_labels F(1)  F(2)         F(3)              F(n)

A block is at most `window` training batches of one epoch, in as few and as equal blocks as possible, with the epoch's
held-out batches in its last one. All items of a block are made by one version of the bottom, which is the newest that
every one of them can know: a version is a count of blocks that the bottom was fitted to.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from fractions import Fraction

from typing_extensions import override

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.plan import Item, Place, Plan, Purpose, rows_of
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.protocols.stream import Half, StreamSequence


@dataclass(frozen=True)
class BlockPlan(Plan):
    """Plan in blocks.

    Attributes:
        lag: blocks, a block itself included, whose answers its forward cannot know: 1, or 2 in a protocol with a head.
    """

    lag: int = 1

    @property
    def per_epoch(self) -> int:
        """Number of blocks of an epoch."""
        return max(1, -(-self.batches(self.train) // self.window))

    @property
    def blocks(self) -> int:
        """Number of blocks of the run."""
        return self.epochs * self.per_epoch

    @property
    @override
    def unanswered(self) -> int:
        return len(self.items(1))

    def block_of(self, number: int) -> int:
        """Return the block, from 1, of an item."""
        epoch = self.epoch_of(number)
        ends = range(1, self.per_epoch)
        within = bisect_left(ends, number - self.end(epoch - 1), key=self._trained)
        return (epoch - 1) * self.per_epoch + within + 1

    def block_end(self, block: int) -> int:
        """Return the number of the last item of a block; 0 for block 0."""
        epoch, within = divmod(block, self.per_epoch)
        return self.end(epoch) + (self._trained(within) if within else 0)

    def items(self, block: int) -> range:
        """Return the numbers of a block's items."""
        return range(self.block_end(block - 1) + 1, self.block_end(block) + 1)

    def ends_training(self, item: Item) -> bool:
        """Return whether an item is the last training batch of its block."""
        within = self.block_of(item.number) - (item.epoch - 1) * self.per_epoch
        return item.purpose is Purpose.TRAIN and item.batch + 1 == self.batches_until(within)

    @override
    def item(self, number: int) -> Item:
        epoch, block = self.epoch_of(number), self.block_of(number)
        version = max(0, block - self.lag) if self.train else 0
        within = block - (epoch - 1) * self.per_epoch
        offset = number - self.end(epoch - 1) - 1
        if offset >= self._trained(self.per_epoch):
            return replace(self.held_out(number, epoch, offset - self._trained(self.per_epoch)), version=version)
        batches = self.batches(self.train)
        batch, end = offset - self._averaged(within - 1), self.batches_until(within)
        if batch == end:
            return Item(number, Purpose.AVERAGE, epoch, batch - 1, batches, range(0), version)
        rows = rows_of(self.train, batch, batches)
        return Item(number, Purpose.TRAIN, epoch, batch, batches, rows, version)

    @override
    def averagings_until(self, epochs: int) -> int:
        return epochs * self._averaged(self.per_epoch)

    def _trained(self, within: int) -> int:
        """Return the number of training batches and averagings in the first blocks of an epoch."""
        return self.batches_until(within) + self._averaged(within)

    def batches_until(self, within: int) -> int:
        """Return the number of training batches in the first blocks of an epoch."""
        return self.batches(self.train) * within // self.per_epoch

    def _averaged(self, within: int) -> int:
        return within if self.average_every is not None and self.train else 0


@dataclass(frozen=True)
class BlockSequence(StreamSequence):
    """Sequence of a site's messages, night by night."""

    plan: BlockPlan

    @override
    def _at(self, seq: int) -> tuple[int, Half]:
        if not self.has_head:
            return seq, "first"
        night = bisect_left(range(1, self.plan.blocks + 2), seq, key=self._until)  # from 0
        offset = seq - self._until(night)
        seconds = len(self.plan.items(night)) if night else 0
        if offset <= seconds:
            return self.plan.block_end(night - 1) + offset, "second"
        return self.plan.block_end(night) + offset - seconds, "first"

    @override
    def seq_of_first(self, q: int) -> int:
        if not self.has_head:
            return q
        return q + self.plan.block_end(self.plan.block_of(q) - 1)

    @override
    def completing_seq(self, q: int) -> int:
        if not self.has_head:
            return q
        return q + self.plan.block_end(self.plan.block_of(q))

    @override
    def place(self, seq: int) -> Place:
        slot = self.slot(seq)
        if slot.half == "first":
            return slot.item.place
        # Before the first halves that they travel with: these are answered by layers that have learnt of them.
        block = self.plan.block_of(slot.item.number)
        epoch, within = divmod(block, self.plan.per_epoch)
        return epoch + 1, 0, Fraction(self.plan.batches_until(within), max(1, self.plan.batches(self.plan.train)))

    def _until(self, night: int) -> int:
        """Return the number of messages before a night, counted from 0: it begins with the halves that are open."""
        return self.plan.block_end(min(night, self.plan.blocks)) + (self.plan.block_end(night - 1) if night else 0)


def sequence_for(config: RunConfig, train: int, validation: int, test: int) -> StreamSequence:
    """Return the sequence of a site with these numbers of samples."""
    has_head = spec_of(config).has_head
    plan = Plan.of(config, train, validation, test)
    if config.run.learning == "steps":
        return StreamSequence(plan, has_head)
    return BlockSequence(BlockPlan(**vars(plan), lag=2 if has_head else 1), has_head)
