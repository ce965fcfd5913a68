"""Which samples an item of the plan holds: a pure function of (data, run seed, site, item)."""

from __future__ import annotations

from functools import lru_cache

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.losses import standardise
from nightsplit.shared.learning.seeds import seed_for
from nightsplit.shared.protocols.plan import Plan, Step
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.site_worker.data.augment import augment
from nightsplit.site_worker.data.dataset import Dataset, Parts


class Feed:
    """The batches of one site.

    Args:
        config: the run.
        site: the site's name.
        parts: its scaled data, divided by patient.
    """

    def __init__(self, config: RunConfig, site: str, parts: Parts) -> None:
        self.plan = Plan.of(config, len(parts.train), len(parts.validation), len(parts.test))
        self._config = config
        self._site = site
        self._parts: dict[Step, Dataset] = {
            Step.TRAIN: parts.train, Step.VALIDATION: parts.validation, Step.TEST: parts.test,
        }  # fmt: skip
        self._shuffled = lru_cache(maxsize=4)(self._shuffle)

    def inputs(self, q: int) -> torch.Tensor:
        """Inputs (batch, ...) float32 of item q; those of a training batch are augmented."""
        item = self.plan.item(q)
        inputs = self._parts[item.step].inputs[self._rows(q)]
        names = self._config.data.augment
        # What is released once must look like what the model will be asked about.
        if item.step is Step.TRAIN and names and not spec_of(self._config).uploads_once:
            generator = torch.Generator().manual_seed(self.seed("augment", q))
            inputs = augment(inputs, names, generator)
        return inputs

    def targets(self, q: int) -> torch.Tensor:
        """Targets (batch,) of item q, standardised for regression."""
        targets = self._parts[self.plan.item(q).step].targets[self._rows(q)]
        return standardise(self._config.task, self._config.data, targets)

    def seed(self, purpose: str, q: int) -> int:
        """Seed of what is random in item q."""
        return seed_for(self._config.run.seed, purpose, self._site, q)

    def _rows(self, q: int) -> torch.Tensor:
        item = self.plan.item(q)
        rows = self.plan.rows(q)
        if item.step is Step.TRAIN:
            return self._shuffled(item.epoch)[rows.start : rows.stop]
        return torch.arange(rows.start, rows.stop)

    def _shuffle(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_for(self._config.run.seed, "order", self._site, epoch))
        return torch.randperm(len(self._parts[Step.TRAIN]), generator=generator)
