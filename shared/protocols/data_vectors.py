"""The contract of data_vectors: as of any round, and a report on every scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nightsplit.shared.models.layout import Layout
from nightsplit.shared.protocols import rounds
from nightsplit.shared.wire.message import Kind
from nightsplit.shared.wire.schema import Payload, TensorSpec

SCALES = tuple(tenths / 10 for tenths in range(1, 11))
"""Factors of the sum of vectors that sites judge."""


def contract(layout: Layout) -> Mapping[Kind, Payload]:
    """Payload of each kind: a report holds figures and normalization statistics for each scale."""
    statistics = int(layout.statistics.sum())
    tensors = {"statistics": TensorSpec(torch.float32, (len(SCALES), statistics))} if statistics else {}
    return {**rounds.CONTRACT, Kind.REPORT: Payload(tensors, {"metrics": str})}
