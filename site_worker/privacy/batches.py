"""Batches for training with noise, sampled at random from the site's secret."""

import torch
from typing_extensions import override

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.seeds import Seed
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.rounds.batches import RoundBatches


class PrivateBatches(RoundBatches):
    """Poisson samples of a site's training records, numbered from 0; a batch may be empty.

    `accounting.epsilon_of` is valid only while the batches are secret. The seeds of augmentation and dropout are secret
    as well, since a record that is not in a batch shifts the random numbers of the others. `secret` is the run's,
    `rate` the probability of each record.
    """

    def __init__(self, config: RunConfig, site: str, splits: Splits, secret: Secret, rate: float) -> None:
        super().__init__(config, site, splits, secret.key)
        self._secret = secret
        self._rate = rate

    @override
    def rows(self, k: int) -> torch.Tensor:
        return torch.from_numpy(self._secret.derive("records", k).records(len(self.train), self._rate))

    @override
    def seed(self, purpose: str, k: int) -> Seed:
        return self._secret.derive(purpose, k).key
