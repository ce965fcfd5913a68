"""fedavg_transfer: the sites' updates of a published model are averaged, round by round."""

from nightsplit.shared.protocols import rounds
from nightsplit.shared.protocols.spec import ProtocolSpec, Shape

SPEC = ProtocolSpec(
    name="fedavg_transfer",
    paper="Zhang and Li, arXiv 2203.12803, stage 2",
    shape=Shape.ROUND,
    payloads=rounds.payloads,
    check=rounds.check,
    settings=rounds.settings,
    names=rounds.NAMES,
)
