"""Which samples a training batch of a round holds: a pure function of (data, run seed, site, batch)."""

import math
from collections.abc import Mapping
from functools import lru_cache

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.losses import standardise
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.protocols.rounds import Work
from nightsplit.site_worker.data.augment import augment
from nightsplit.site_worker.data.dataset import Dataset, Splits


class RoundBatches:
    """The batches of one site, numbered from 0 over all its rounds; `splits` is its scaled data."""

    def __init__(self, config: RunConfig, site: str, splits: Splits) -> None:
        self.train = splits.train
        self.held_out: Mapping[Purpose, Dataset] = {Purpose.VALIDATION: splits.validation, Purpose.TEST: splits.test}
        self.config = config
        self._site = site
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def rows(self, k: int) -> torch.Tensor:
        """Rows, int64 (batch,), of training batch k: pass after pass over the data, each in an order of its own."""
        batches = -(-len(self.train) // self.config.run.batch_size)
        epoch, batch = divmod(k, batches)
        # Batches of a pass differ by one sample at most: the last one is not left with a single sample.
        first, last = len(self.train) * batch // batches, len(self.train) * (batch + 1) // batches
        return self._shuffled(epoch)[first:last]

    def batch(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (batch, ...) float32, augmented, and targets of training batch k; standardised for regression."""
        rows = self.rows(k)
        inputs = self.train.inputs[rows]
        if self.config.data.augment:
            generator = torch.Generator().manual_seed(self.seed("augment", k))
            inputs = augment(inputs, self.config.data.augment, generator)
        return inputs, self.targets(self.train)[rows]

    def targets(self, part: Dataset) -> torch.Tensor:
        """Targets of a part, standardised for regression."""
        return standardise(self.config.task, self.config.data, part.targets)

    def rate(self, k: int) -> float:
        """Factor of the learning rate in batch k."""
        if self.config.round.decay == "none":
            return 1.0
        planned = self.config.round.rounds * Work.of(self.config, len(self.train)).batches
        return 0.5 * (1 + math.cos(math.pi * k / planned))

    def seed(self, purpose: str, k: int) -> int:
        """Seed of what is random in batch k."""
        return seed_for(self.config.run.seed, purpose, self._site, k)

    def _shuffle(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_for(self.config.run.seed, "order", self._site, epoch))
        return torch.randperm(len(self.train), generator=generator)
