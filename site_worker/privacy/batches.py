"""Batches for training with noise: each record is in a batch by chance, and nobody else can tell which are."""

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.privacy.secret import Secret
from nightsplit.site_worker.rounds.batches import RoundBatches


class PrivateBatches(RoundBatches):
    """Poisson samples of a site's training records, numbered from 0; a batch may be empty.

    That a batch is secret is what makes it cheap: the accounting of `accounting.epsilon_of` counts on it. What
    else is drawn for a batch (augmentation, dropout) is secret as well, since a record that is left out shifts
    what the others draw. `secret` is the run's, `rate` the probability of each record.
    """

    def __init__(self, config: RunConfig, site: str, parts: Splits, secret: Secret, rate: float) -> None:
        super().__init__(config, site, parts)
        self._secret = secret
        self._rate = rate

    def rows(self, k: int) -> torch.Tensor:
        """See `RoundBatches`."""
        return torch.from_numpy(self._secret.derive("records", k).records(len(self.train), self._rate))

    def seed(self, purpose: str, k: int) -> int:
        """See `RoundBatches`."""
        return int.from_bytes(self._secret.derive(purpose, k).key[:8], "big") >> 1
