"""A site's part in a private run: its own noise, its sampling, and an account in its ledger."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from nightsplit.shared.config.run import PrivacySection, RunConfig
from nightsplit.shared.engine.effects import Spend
from nightsplit.shared.protocols.rounds import Work, most_updates
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.privacy.accounting import Use, noise_for
from nightsplit.site_worker.privacy.batches import PrivateBatches
from nightsplit.site_worker.privacy.ledger import Ledger
from nightsplit.site_worker.privacy.trainer import PrivateTrainer


class Account:
    """One run's line in the site's ledger, where it has begun; `most` is policy.toml's max_epsilon."""

    def __init__(self, ledger: Ledger, run: str, most: float | None) -> None:
        self.ledger = ledger
        self._run = run
        self._most = most

    def pay(self, spend: Spend) -> None:
        """Pay for the run's steps from 1 on, durably, before weights that contain them leave; see `Ledger.spend`."""
        self.ledger.spend(self._run, spend.steps, self._most)

    def close(self) -> None:
        """Let go of the ledger."""
        self.ledger.close()


class PrivateSplit(NamedTuple):
    """What a site needs in place of `Trainer` and `RoundBatches`."""

    trainer: PrivateTrainer
    batches: PrivateBatches
    account: Account


def take_part(
    config: RunConfig, privacy: PrivacySection, site: str, splits: Splits,
    module: nn.Module, device: str, ledger: Path, most: float | None,
) -> PrivateSplit:  # fmt: skip
    """Enter a private run in the ledger, and make what trains in it.

    Sites have different numbers of records, so each computes the noise that keeps its own records within
    privacy.epsilon over all the steps that it may take in the run.

    `privacy` is that of `config`, `splits` the site's scaled data, `ledger` a file, `most` policy.toml's max_epsilon.

    Raises:
        RunError: 610 the model mixes records; 611, 612, 613 as `Ledger.begin`.
    """
    records = len(splits.train)
    rate = min(1.0, config.run.batch_size / records)
    steps = most_updates(config) * Work.of(config, records).batches
    use = Use(rate, noise_for(privacy.epsilon, privacy.delta, rate, steps), steps)
    book = Ledger(ledger)
    identity = f"{config.digest} {site} {splits.train.fingerprint}"
    entry = book.begin(config.run.id, identity, use, privacy.delta, splits.train.patients, most)
    secret = book.secret.derive("run", config.run.id, identity)
    # The entry's noise, and not the one just computed: another version of dp-accounting may round otherwise.
    trainer = PrivateTrainer(module, config, device, privacy, secret, entry.use.sigma, rate * records)
    return PrivateSplit(trainer, PrivateBatches(config, site, splits, secret, rate), Account(book, config.run.id, most))
