"""The parts of a private run at a site: trainer, batches, and an account in the ledger."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from torch import nn
from typing_extensions import override

from nightsplit.shared.config.run import PrivacySection, RunConfig
from nightsplit.shared.engine.effects import Spend
from nightsplit.shared.protocols.rounds import Work, updates_max
from nightsplit.site_worker import role
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.privacy import check_delta
from nightsplit.site_worker.privacy.accounting import Use, noise_for
from nightsplit.site_worker.privacy.batches import PrivateBatches
from nightsplit.site_worker.privacy.ledger import Ledger
from nightsplit.site_worker.privacy.trainer import PrivateTrainer


class Account(role.Account):
    """Entry of a run in the site's ledger; `epsilon_max` is policy.toml's max_epsilon."""

    def __init__(self, ledger: Ledger, run: str, epsilon_max: float | None) -> None:
        self.ledger = ledger
        self._run = run
        self._epsilon_max = epsilon_max

    @override
    def pay(self, spend: Spend) -> None:
        self.ledger.spend(self._run, spend.steps, self._epsilon_max)

    @override
    def close(self) -> None:
        self.ledger.close()


class PrivateTraining(NamedTuple):
    """Trainer and batches of a private run, and its account."""

    trainer: PrivateTrainer
    batches: PrivateBatches
    account: Account


def take_part(
    config: RunConfig, privacy: PrivacySection, site: str, splits: Splits,
    module: nn.Module, device: str, ledger: Path, epsilon_max: float | None,
) -> PrivateTraining:  # fmt: skip
    """Enter a private run in the ledger, and make its trainer and batches.

    Sites have different numbers of records, so each computes the noise that keeps its own records within
    privacy.epsilon over all the steps that it may take in the run.

    `splits` is the site's scaled data, `ledger` a file, `epsilon_max` policy.toml's max_epsilon.

    Raises:
        RunError: 610 the model mixes records; 611, 612, 613 as `Ledger.begin`; 616 as `check_delta`.
    """
    records = len(splits.train)
    check_delta(privacy, records)
    rate = min(1.0, config.run.batch_size / records)
    steps = updates_max(config) * Work.of(config, records).batches
    use = Use(rate, noise_for(privacy.epsilon, privacy.delta, rate, steps), steps)
    with ExitStack() as opened:
        book = opened.enter_context(closing(Ledger(ledger)))
        identity = f"{config.digest} {site} {splits.train.fingerprint}"
        entry = book.begin(config.run.id, identity, use, privacy.delta, splits.train.patients, epsilon_max)
        secret = book.secret.derive("run", config.run.id, identity)
        # The noise of the entry and not of `use`: another version of dp-accounting may round differently.
        trainer = PrivateTrainer(module, config, device, privacy, secret, entry.use.sigma, rate * records)
        batches = PrivateBatches(config, site, splits, secret, rate)
        opened.pop_all()  # the account closes it
    return PrivateTraining(trainer, batches, Account(book, config.run.id, epsilon_max))
