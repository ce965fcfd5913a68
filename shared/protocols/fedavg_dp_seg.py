"""fedavg_dp_seg: fedavg_transfer with differential privacy at the site."""

from dataclasses import replace

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.protocols import rounds


def check(config: RunConfig) -> None:
    """Raise `KeyConflictError` if run.toml has settings that the protocol does not support."""
    rounds.check(config)
    if config.privacy is None:
        remedy = "give epsilon, delta and clip under [privacy]."
        raise KeyConflictError("privacy", "fedavg_dp_seg needs a privacy budget", remedy)


SPEC = rounds.protocol(
    name="fedavg_dp_seg",
    paper="Ziller et al., arXiv 2107.02586",
    payloads=rounds.payloads,
    check=check,
    names=replace(rounds.NAMES, heading="federated, noise"),
)
