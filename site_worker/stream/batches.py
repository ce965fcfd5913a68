"""Which samples an item of the plan holds: a pure function of (data, run seed, site, item)."""

from functools import lru_cache

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.losses import standardise
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.plan import Item, Plan, Purpose
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.site_worker.data.augment import augment
from nightsplit.site_worker.data.dataset import Dataset, Splits


class StreamBatches:
    """The batches of one site.

    Args:
        config: the run.
        site: the site's name.
        splits: its scaled data, divided by patient.
    """

    def __init__(self, config: RunConfig, site: str, splits: Splits) -> None:
        self.plan = Plan.of(config, len(splits.train), len(splits.validation), len(splits.test))
        self._config = config
        self._site = site
        self._parts: dict[Purpose, Dataset] = {
            Purpose.TRAIN: splits.train, Purpose.VALIDATION: splits.validation, Purpose.TEST: splits.test,
        }  # fmt: skip
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def inputs(self, item: Item) -> torch.Tensor:
        """Inputs (batch, ...) float32 of an item; those of a training batch are augmented."""
        inputs = self._parts[item.purpose].inputs[self._rows(item)]
        names = self._config.data.augment
        # What is released once must look like what the model will be asked about.
        if item.purpose is Purpose.TRAIN and names and not spec_of(self._config).uploads_once:
            generator = torch.Generator().manual_seed(self.seed("augment", item))
            inputs = augment(inputs, names, generator)
        return inputs

    def targets(self, item: Item) -> torch.Tensor:
        """Targets (batch,) of an item, standardised for regression."""
        targets = self._parts[item.purpose].targets[self._rows(item)]
        return standardise(self._config.task, self._config.data, targets)

    def seed(self, layers: str, item: Item) -> int:
        """Seed of what is random in an item."""
        return seed_for(self._config.run.seed, layers, self._site, item.number)

    def _rows(self, item: Item) -> torch.Tensor:
        rows = item.rows
        if item.purpose is Purpose.TRAIN:
            return self._shuffled(item.epoch)[rows.start : rows.stop]
        return torch.arange(rows.start, rows.stop)

    def _shuffle(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_for(self._config.run.seed, "order", self._site, epoch))
        return torch.randperm(len(self._parts[Purpose.TRAIN]), generator=generator)
