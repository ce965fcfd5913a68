"""The site's side of each protocol."""

from pathlib import Path
from typing import NamedTuple

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.seeds import Seed
from nightsplit.shared.protocols.build import WholeModel, build_model
from nightsplit.shared.protocols.spec import load_roles, spec_of
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.privacy import check_installed
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.rounds.batches import RoundBatches
from nightsplit.site_worker.rounds.role import RoundSite
from nightsplit.site_worker.rounds.trainer import Trainer
from nightsplit.site_worker.stream.role import StreamSite

ROLES = load_roles(__name__)


class Budget(NamedTuple):
    """Privacy budget: the file of its ledger, and the largest epsilon that all runs may spend on a record."""

    ledger: Path
    max_epsilon: float | None = None


def make_site(
    name: str, config: RunConfig, splits: Splits, incarnation: str, base: Path, device: str = "cpu",
    budget: Budget | None = None, seed: Seed | None = None,
) -> SiteRole:  # fmt: skip
    """Make the role of the site `name` in a run.

    Args:
        splits: the site's scaled data.
        base: folder of run.toml.
        budget: of the hospital's patients; required by runs with differential privacy.
        seed: the site's secret seed of order, dropout, augmentation and, with independent bottoms that are trained, of
            the first weights of its layers; None for the run's public seed.

    Raises:
        ConfigError: 104, 105 the model cannot be used.
        RunError: 610-613, 616 as `take_part`, 614 as `check_installed`.
    """
    has_own_weights = config.run.bottoms == "independent" and spec_of(config).trains_bottom
    model = build_model(config, base, seed if has_own_weights else None)
    own_seed = config.run.seed if seed is None else seed
    if not isinstance(model, WholeModel):
        stream: type[StreamSite] = ROLES[config.run.protocol, config.run.learning]
        return stream(name, config, model, splits, incarnation, device, own_seed)
    role: type[RoundSite] = ROLES[config.run.protocol, config.run.learning]
    if config.privacy is None:
        trainer = Trainer(model.module, config, device)
        return role(name, config, model, trainer, RoundBatches(config, name, splits, own_seed), incarnation)
    assert budget is not None, "a private run needs a ledger"
    check_installed()
    from nightsplit.site_worker.privacy.site import take_part  # needs an extra, and its import takes seconds

    private = take_part(config, config.privacy, name, splits, model.module, device, budget.ledger, budget.max_epsilon)
    return role(name, config, model, private.trainer, private.batches, incarnation, private.account)
