"""split_u, U-shaped: the last layers and the labels stay at the site."""

import torch

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.protocols import stream
from nightsplit.shared.protocols.handshake import HANDSHAKE, PROGRESS
from nightsplit.shared.protocols.spec import Shapes
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Contract, Payload, Reveals, ScalarSpec, TensorSpec, contract


def payloads(config: RunConfig, shapes: Shapes) -> Contract:
    """Return the contract of a run."""
    activations = TensorSpec(torch.float32, ("batch", *shapes.head), config.wire.smashed, config.wire.zstd)
    if config.run.learning == "targets":
        late = Payload(Kind.HEAD_TARGET, stream.displacement(config, shapes.head, Reveals.GRADIENTS))
    else:
        late = Payload(Kind.HEAD_GRADIENT, stream.gradient(config, shapes.head, Reveals.GRADIENTS))
    return contract(
        *HANDSHAKE,
        Payload(Kind.SMASHED, {"smashed": stream.activations(config, shapes)}),
        Payload(Kind.HEAD_INPUT, {"activations": activations}, PROGRESS),
        late,
        Payload(Kind.REPORT, scalars={"metrics": ScalarSpec(str, Reveals.COUNTS)}),
        *stream.answers(config, shapes),
        stream.finish(config, shapes),
    )


def check(config: RunConfig) -> None:
    """Raise `KeyConflictError` if run.toml has settings that the protocol does not support."""
    stream.check(config)
    if config.model.head_cut is None:
        remedy = "set head_cut, after cut and before the end."
        raise KeyConflictError("model.head_cut", "split_u needs the start of the head", remedy)


PAPER = "the U-shaped extension of Ha et al., IEEE Access 2021"
SPEC = stream.protocol(
    name="split_u", paper=PAPER, payloads=payloads, check=check, has_head=True, learns_by_targets=True
)
