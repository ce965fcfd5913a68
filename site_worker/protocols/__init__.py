"""The site's side of each protocol."""

from pathlib import Path

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.build import WholeModel, build_model
from nightsplit.shared.protocols.spec import load_roles
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.privacy import check_installed
from nightsplit.site_worker.role import SiteRole
from nightsplit.site_worker.rounds.batches import RoundBatches
from nightsplit.site_worker.rounds.role import RoundSite
from nightsplit.site_worker.rounds.trainer import Trainer
from nightsplit.site_worker.stream.role import StreamSite

ROLES = load_roles(__name__)


def make_site(
    name: str, config: RunConfig, splits: Splits, incarnation: str, base: Path, device: str = "cpu",
    ledger: Path | None = None, max_epsilon: float | None = None,
) -> SiteRole:  # fmt: skip
    """Make the role of the site `name` in a run.

    Args:
        splits: the site's scaled data.
        base: folder of run.toml.
        ledger: file of the privacy ledger; required by runs with differential privacy.
        max_epsilon: largest epsilon that these runs may spend on a record.

    Raises:
        ConfigError: 104, 105 the model cannot be used.
        RunError: 610-613 as `take_part`, 614 as `check_installed`.
    """
    model = build_model(config, base)
    if not isinstance(model, WholeModel):
        stream: type[StreamSite] = ROLES[config.run.protocol]
        return stream(name, config, model, splits, incarnation, device)
    role: type[RoundSite] = ROLES[config.run.protocol]
    if config.privacy is None:
        trainer = Trainer(model.module, config, device)
        return role(name, config, model, trainer, RoundBatches(config, name, splits), incarnation)
    assert ledger is not None, "a private run needs a ledger"
    check_installed()
    from nightsplit.site_worker.privacy.site import take_part  # needs an extra, and its import takes seconds

    private = take_part(config, config.privacy, name, splits, model.module, device, ledger, max_epsilon)
    return role(name, config, model, private.trainer, private.batches, incarnation, private.account)
