"""Samples of each training batch of a round: a pure function of (data, seed, site, batch)."""

from collections.abc import Mapping
from functools import lru_cache

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.losses import standardise
from nightsplit.shared.learning.optimizers import Progress
from nightsplit.shared.learning.seeds import Seed, generator_at, seed_for
from nightsplit.shared.protocols.plan import Purpose
from nightsplit.shared.protocols.rounds import Work
from nightsplit.site_worker.data.augment import augment
from nightsplit.site_worker.data.dataset import Dataset, Splits


class RoundBatches:
    """Batches of one site, numbered from 0 over all rounds.

    Args:
        splits: its scaled data.
        seed: of their order, of dropout and of augmentation.
    """

    def __init__(self, config: RunConfig, site: str, splits: Splits, seed: Seed) -> None:
        self.train = splits.train
        self.held_out: Mapping[Purpose, Dataset] = {Purpose.VALIDATION: splits.validation, Purpose.TEST: splits.test}
        self.config = config
        self._site, self._seed = site, seed
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def rows(self, k: int) -> torch.Tensor:
        """Return the rows, int64 (batch,), of training batch k; each epoch is shuffled anew."""
        batches = -(-len(self.train) // self.config.run.batch_size)
        epoch, batch = divmod(k, batches)
        # Sizes in an epoch differ by at most one, so that the last batch does not hold a single sample.
        first, last = len(self.train) * batch // batches, len(self.train) * (batch + 1) // batches
        return self._shuffled(epoch)[first:last]

    def batch(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs (batch, ...) float32, augmented, and targets, standardised for regression, of batch k."""
        rows = self.rows(k)
        inputs = self.train.inputs[rows]
        if self.config.data.augment:
            inputs = augment(inputs, self.config.data.augment, generator_at(self.seed("augment", k)))
        return inputs, self.targets(self.train)[rows]

    def targets(self, dataset: Dataset) -> torch.Tensor:
        """Return the targets of a split, standardised for regression."""
        return standardise(self.config.task, self.config.data, dataset.targets)

    def progress(self, k: int) -> Progress:
        """Return the progress of the training before batch k."""
        return Progress(k, k, self.config.round.rounds * Work.of(self.config, len(self.train)).batches)

    def seed(self, purpose: str, k: int) -> Seed:
        """Return the seed of batch k for a purpose: dropout or augmentation."""
        return seed_for(self._seed, purpose, self._site, k)

    def _shuffle(self, epoch: int) -> torch.Tensor:
        generator = generator_at(seed_for(self._seed, "order", self._site, epoch))
        return torch.randperm(len(self.train), generator=generator)
