"""Samples of each item of the plan: a pure function of (data, seed, site, item)."""

from functools import lru_cache

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.losses import standardise
from nightsplit.shared.learning.seeds import Seed, generator_at, seed_for
from nightsplit.shared.protocols.blocks import sequence_for
from nightsplit.shared.protocols.plan import Item, Purpose
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.site_worker.data.augment import augment
from nightsplit.site_worker.data.dataset import Dataset, Splits


class StreamBatches:
    """Batches of one site.

    Args:
        splits: its scaled data, divided by patient.
        seed: of their order, of dropout and of augmentation.
    """

    def __init__(self, config: RunConfig, site: str, splits: Splits, seed: Seed) -> None:
        self.sequence = sequence_for(config, len(splits.train), len(splits.validation), len(splits.test))
        self.plan = self.sequence.plan
        self._config = config
        self._site, self._seed = site, seed
        self._parts: dict[Purpose, Dataset] = {
            Purpose.TRAIN: splits.train, Purpose.VALIDATION: splits.validation, Purpose.TEST: splits.test,
        }  # fmt: skip
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def inputs(self, item: Item) -> torch.Tensor:
        """Return the inputs (batch, ...) float32 of an item, augmented in a training batch."""
        inputs = self._parts[item.purpose].inputs[self._rows(item)]
        names = self._config.data.augment
        # Activations that are uploaded once must come from inputs like those of evaluation.
        if item.purpose is Purpose.TRAIN and names and not spec_of(self._config).uploads_once:
            inputs = augment(inputs, names, generator_at(self.seed("augment", item)))
        return inputs

    def targets(self, item: Item) -> torch.Tensor:
        """Return the targets (batch,) of an item, standardised for regression."""
        targets = self._parts[item.purpose].targets[self._rows(item)]
        return standardise(self._config.task, self._config.data, targets)

    def seed(self, layers: str, item: Item) -> Seed:
        """Return the seed of an item for dropout in `layers`, or for augmentation."""
        return seed_for(self._seed, layers, self._site, item.number)

    def _rows(self, item: Item) -> torch.Tensor:
        rows = item.rows
        if item.purpose is Purpose.TRAIN:
            return self._shuffled(item.epoch)[rows.start : rows.stop]
        return torch.arange(rows.start, rows.stop)

    def _shuffle(self, epoch: int) -> torch.Tensor:
        generator = generator_at(seed_for(self._seed, "order", self._site, epoch))
        return torch.randperm(len(self._parts[Purpose.TRAIN]), generator=generator)
