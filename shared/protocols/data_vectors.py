"""The contract of data_vectors: as of any round, and a report on every scale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

import msgspec
import torch
from msgspec import Meta

from nightsplit.shared.errors import Refused
from nightsplit.shared.models.layout import Layout
from nightsplit.shared.protocols import rounds
from nightsplit.shared.protocols.report import LONGEST
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload, TensorSpec

SCALES = tuple(tenths / 10 for tenths in range(1, 11))
"""Factors of the sum of vectors that sites judge."""

_ONE_EACH: msgspec.json.Decoder[list[str]] = msgspec.json.Decoder(
    Annotated[list[Annotated[str, Meta(max_length=LONGEST)]], Meta(min_length=len(SCALES), max_length=len(SCALES))]
)


def contract(layout: Layout) -> Mapping[Kind, Payload]:
    """Payload of each kind: a report holds figures and normalization statistics for each scale."""
    statistics = int(layout.statistics.sum())
    tensors = {"statistics": TensorSpec(torch.float32, (len(SCALES), statistics))} if statistics else {}
    return {**rounds.CONTRACT, Kind.REPORT: Payload(tensors, {"metrics": str})}


def encode_reports(reports: list[str]) -> str:
    """Write one report per scale as the text that travels."""
    return json.dumps(reports)


def decode_reports(text: str, name: str) -> list[str]:
    """Reports, one per scale, of which none is read yet.

    Raises:
        Refused: 304 message `name` has no such reports.
    """
    try:
        return _ONE_EACH.decode(text)
    except (msgspec.MsgspecError, ValueError):
        raise Refused(304, f"{name} has no figures for {len(SCALES)} scales.", "run one version at both.") from None
