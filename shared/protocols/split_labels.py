"""split_labels: sites send activations and labels, the server returns gradients."""

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols import stream
from nightsplit.shared.protocols.handshake import HANDSHAKE
from nightsplit.shared.protocols.spec import Shapes
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Contract, Payload, contract


def payloads(config: RunConfig, shapes: Shapes) -> Contract:
    """Return the contract of a run."""
    smashed = {"smashed": stream.activations(config, shapes), "targets": stream.targets(config)}
    return contract(
        *HANDSHAKE, Payload(Kind.SMASHED, smashed), *stream.answers(config, shapes), stream.finish(config, shapes)
    )


PAPER = "Ha et al., IEEE Access 2021, doi 10.1109/ACCESS.2021.3108455"
SPEC = stream.protocol(name="split_labels", paper=PAPER, payloads=payloads, check=stream.check, learns_by_targets=True)
