"""The contract of a message kind: exactly which tensors and scalars it carries.

Whoever encodes and whoever decodes use the same `Payload`; what differs from it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Codec = Literal["raw", "fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a payload.

    Attributes:
        dtype: dtype before encoding and after decoding.
        shape: a length per dimension; a name stands for any length >= 1 that is the same wherever
            the name occurs in the message, e.g. ("batch", 16, 32, 32).
        codec: how it travels; "raw" keeps its bytes, the others need dtype float32.
        zstd: its encoded bytes are compressed.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    codec: Codec = "raw"
    zstd: bool = False


@dataclass(frozen=True, slots=True)
class Payload:
    """All that a message of one kind carries; floating-point values must be finite."""

    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    scalars: Mapping[str, type[bool] | type[int] | type[float] | type[str]] = field(default_factory=dict)
