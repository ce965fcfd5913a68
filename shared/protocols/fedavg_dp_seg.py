"""fedavg_dp_seg: as fedavg_transfer, with differential privacy at the site."""

from dataclasses import replace

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.protocols import rounds
from nightsplit.shared.protocols.spec import ProtocolSpec, Shape


def check(config: RunConfig) -> None:
    """Raise `KeyConflictError` where run.toml asks for what the system has not."""
    rounds.check(config)
    if config.privacy is None:
        what = "fedavg_dp_seg says how private it is"
        raise KeyConflictError("privacy", what, "give epsilon, delta and clip under [privacy].")


SPEC = ProtocolSpec(
    name="fedavg_dp_seg",
    paper="Ziller et al., arXiv 2107.02586",
    shape=Shape.ROUND,
    payloads=rounds.payloads,
    check=check,
    settings=rounds.settings,
    names=replace(rounds.NAMES, heading="federated, noise"),
)
