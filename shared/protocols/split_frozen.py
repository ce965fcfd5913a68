"""split_frozen: activations of an untrained bottom are uploaded once; the server trains on its store of them."""

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.protocols import stream
from nightsplit.shared.protocols.handshake import HANDSHAKE
from nightsplit.shared.protocols.spec import Shapes
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Contract, Payload, contract


def payloads(config: RunConfig, shapes: Shapes) -> Contract:
    """Return the contract of a run, in which the server sends only the end."""
    smashed = {"smashed": stream.activations(config, shapes, stored=True), "targets": stream.targets(config)}
    return contract(*HANDSHAKE, Payload(Kind.SMASHED, smashed), stream.finish(config, shapes))


def check(config: RunConfig) -> None:
    """Raise `KeyConflictError` if run.toml has settings that the protocol does not support."""
    stream.check(config)
    if config.run.bottoms == "averaged":
        raise KeyConflictError("run.bottoms", "a bottom that is never trained needs no averaging", "remove it.")


SPEC = stream.protocol(
    name="split_frozen",
    paper="Ha et al., IEEE Access 2021, with the site's layers detached in time",
    payloads=payloads,
    check=check,
    trains_bottom=False,
    uploads_once=True,
)
