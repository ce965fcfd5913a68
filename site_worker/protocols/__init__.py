"""The site halves of the systems."""

from __future__ import annotations

from pathlib import Path

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols import ROUNDS
from nightsplit.shared.protocols.build import assemble, assemble_rounds
from nightsplit.site_worker.data.dataset import Parts
from nightsplit.site_worker.privacy import check_installed
from nightsplit.site_worker.protocols.data_vectors import DataVectorsSite
from nightsplit.site_worker.protocols.fedavg_dp_seg import FedavgDpSegSite
from nightsplit.site_worker.protocols.fedavg_transfer import FedavgTransferSite
from nightsplit.site_worker.protocols.split_frozen import SplitFrozenSite
from nightsplit.site_worker.protocols.split_labels import SplitLabelsSite
from nightsplit.site_worker.protocols.split_u import SplitUSite
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.rounds.batches import RoundFeed
from nightsplit.site_worker.rounds.trainer import Trainer
from nightsplit.site_worker.stream.batches import Feed
from nightsplit.site_worker.stream.bottom import Bottom

OF_ROUNDS = {"fedavg_transfer": FedavgTransferSite, "fedavg_dp_seg": FedavgDpSegSite, "data_vectors": DataVectorsSite}
WITHOUT_HEAD = {"split_labels": SplitLabelsSite, "split_frozen": SplitFrozenSite}


def make_site(
    name: str, config: RunConfig, parts: Parts, incarnation: str, base: Path, device: str = "cpu",
    ledger: Path | None = None, max_epsilon: float | None = None,
) -> SiteRole:  # fmt: skip
    """The role of a site in a run.

    Args:
        name: the site.
        config: the run.
        parts: the site's scaled data.
        incarnation: names this process.
        base: folder of run.toml.
        device: where the site's layers compute.
        ledger: file of what runs with differential privacy have spent; needed by those.
        max_epsilon: the most that they may spend.

    Raises:
        ConfigError: 104, 105 the model cannot be used.
        RunError: 610-613 as `take_part`, 614 as `check_installed`.
    """
    if config.run.protocol in ROUNDS:
        rounds = assemble_rounds(config, base)
        half = OF_ROUNDS[config.run.protocol]
        if config.privacy is not None:
            assert ledger is not None, "a private run needs a ledger"
            check_installed()
            from nightsplit.site_worker.privacy.site import take_part  # its libraries are an extra, and take seconds

            private = take_part(config, config.privacy, name, parts, rounds.module, device, ledger, max_epsilon)
            return half(name, config, rounds, private.trainer, private.feed, incarnation, private.account)
        trainer = Trainer(rounds.module, config, device)
        return half(name, config, rounds, trainer, RoundFeed(config, name, parts), incarnation)
    assembly = assemble(config)
    bottom = Bottom(assembly.halves.bottom, config.optimizer, device)
    feed = Feed(config, name, parts)
    if assembly.halves.head is not None:
        return SplitUSite(name, config, bottom, feed, assembly.contract, incarnation, assembly.halves.head, device)
    return WITHOUT_HEAD[config.run.protocol](name, config, bottom, feed, assembly.contract, incarnation)
