"""data_vectors: each site trains alone, once; their updates are summed, and every site evaluates every scale."""

import json
from dataclasses import replace
from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.section import KeyConflictError
from nightsplit.shared.errors import mismatch
from nightsplit.shared.protocols import rounds
from nightsplit.shared.protocols.report import REPORT_CHARS_MAX
from nightsplit.shared.protocols.spec import Shapes
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Contract, Payload, Reveals, TensorSpec

SCALES = tuple(tenths / 10 for tenths in range(11))
"""Factors of the sum of vectors that sites evaluate; at 0 the model stays the published one."""

_Report = Annotated[str, Meta(max_length=REPORT_CHARS_MAX)]
_Reports = Annotated[list[_Report], Meta(min_length=len(SCALES), max_length=len(SCALES))]
_DECODER: msgspec.json.Decoder[list[str]] = msgspec.json.Decoder(_Reports)


def payloads(config: RunConfig, shapes: Shapes) -> Contract:
    """Return the contract of a run: a report holds metrics and normalization statistics for each scale."""
    spec = TensorSpec(torch.float32, (len(SCALES), shapes.statistics), reveals=Reveals.WEIGHTS)
    report = Payload(Kind.REPORT, {"statistics": spec} if shapes.statistics else {}, {"metrics": rounds.FIGURES})
    return {**rounds.payloads(config, shapes), Kind.REPORT: report}


def check(config: RunConfig) -> None:
    """Raise `KeyConflictError` if run.toml has settings that the protocol does not support."""
    rounds.check(config)
    if "base" in config.run.sites:
        raise KeyConflictError("run.sites", "'base' is the name of the published model's file", "rename the site.")
    if config.round.rounds > 1 or config.round.close == "buffered":
        remedy = 'set rounds = 1, and close = "all" or "quorum".'
        raise KeyConflictError("round.rounds", "vectors are reported once", remedy)


def encode_reports(reports: list[str]) -> str:
    """Encode one report per scale as text."""
    return json.dumps(reports)


def decode_reports(text: str, name: str) -> list[str]:
    """Split a text into one report per scale, not decoded yet; Refused 304 if message `name` has other content."""
    try:
        return _DECODER.decode(text)
    except (msgspec.MsgspecError, ValueError):
        raise mismatch(f"{name} has no figures for {len(SCALES)} scales.") from None


SPEC = rounds.protocol(
    name="data_vectors",
    paper="Tian et al., arXiv 2408.13038",
    payloads=payloads,
    check=check,
    settings=lambda config: f"{config.run.order} order, sum of {config.round.close}",
    names=replace(rounds.NAMES, heading="merged"),
)
