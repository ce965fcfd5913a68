"""Schema of a message kind: its exact tensors and scalars, and the information about patients that each reveals.

Sender and receiver hold the same `Payload`; a message that differs from it is refused. A payload that a site sends
must declare what every part reveals, so that a hospital's policy covers all that leaves the hospital.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

import torch

from nightsplit.shared.wire.codecs import Codec
from nightsplit.shared.wire.message import FROM_SITES, Kind


class Reveals(StrEnum):
    """Information about patients in a tensor or scalar of a message; `TELLS` describes each in words."""

    LABELS = "labels"
    ACTIVATIONS = "activations"
    STORED_ACTIVATIONS = "stored_activations"
    GRADIENTS = "gradients"
    WEIGHTS = "weights"
    COUNTS = "counts"
    CIPHERTEXT = "ciphertext"
    NOTHING = "nothing"


TELLS: Mapping[Reveals, str] = {
    Reveals.LABELS: "the values to be predicted, of each patient in a message",
    Reveals.ACTIVATIONS: "outputs of the site's layers for each patient in a message",
    Reveals.STORED_ACTIVATIONS: "activations that the server keeps, to train on them again or to replay the run",
    Reveals.GRADIENTS: "gradients at the head for each patient in a message; labels can be derived from them",
    Reveals.WEIGHTS: "weights trained on patients of the site, or their change by training at the site",
    Reveals.COUNTS: "numbers of samples, and figures over all held-out patients of the site",
    Reveals.CIPHERTEXT: "encrypted values of patients: only this site can decrypt them",
    Reveals.NOTHING: "names, sequence numbers and settings of the run",
}

BATCH = "batch"
"""Name of the dimension of patients' samples."""

ScalarType = type[bool] | type[int] | type[float] | type[str]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a payload.

    Attributes:
        dtype: dtype before encoding and after decoding.
        shape: a length per dimension; a name stands for any length >= 1 that is the same wherever
            the name occurs in the message, e.g. ("batch", 16, 32, 32). "batch" counts patients' samples.
        codec: encoding on the wire; "raw" keeps its bytes, the others need dtype float32.
        zstd: whether its encoded bytes are compressed.
        reveals: its information about patients; required in messages from sites.
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]
    codec: Codec = "raw"
    zstd: bool = False
    reveals: Reveals | None = None


@dataclass(frozen=True, slots=True)
class ScalarSpec:
    """One scalar of a payload.

    Attributes:
        type: its exact type.
        reveals: as in `TensorSpec`.
        low, high: smallest and largest value of a number.

    Raises:
        TypeError: limits of a type that is not a number.
    """

    type: ScalarType
    reveals: Reveals | None = None
    low: float = -inf
    high: float = inf

    def __post_init__(self) -> None:
        if self.type not in (int, float) and (self.low, self.high) != (-inf, inf):
            raise TypeError(f"a scalar of type {self.type.__name__} has no limits")


@dataclass(frozen=True, slots=True)
class Payload:
    """Complete content of a message of one kind; floating-point values must be finite.

    Attributes:
        kind: kind of the message.
        tensors, scalars: its parts by name.
        sets_weights: whether the server's message replaces weights of layers that the site runs.

    Raises:
        ValueError: a part of a site's message does not declare what it reveals, or a site's message sets weights.
    """

    kind: Kind
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    scalars: Mapping[str, ScalarSpec] = field(default_factory=dict)
    sets_weights: bool = False

    def __post_init__(self) -> None:
        if self.kind not in FROM_SITES:
            return
        if silent := ", ".join(name for name, spec in self._parts if spec.reveals is None):
            raise ValueError(f"{self.kind} leaves a site: declare what it reveals about patients (reveals=): {silent}")
        if self.sets_weights:
            raise ValueError(f"{self.kind} is sent by sites: it cannot set weights at one")

    @property
    def reveals(self) -> frozenset[Reveals]:
        """All information about patients in the message."""
        return frozenset(spec.reveals for _, spec in self._parts if spec.reveals is not None)

    def samples(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Return the number of patients' samples in a message with these shapes; None without a batch dimension."""
        for name, spec in self.tensors.items():
            if BATCH in spec.shape:
                return shapes[name][spec.shape.index(BATCH)]
        return None

    @property
    def _parts(self) -> list[tuple[str, TensorSpec | ScalarSpec]]:
        return [*self.tensors.items(), *self.scalars.items()]


Contract = Mapping[Kind, Payload]
"""Payload of each kind of message in a run."""


def contract(*payloads: Payload) -> Contract:
    """Return the contract of these payloads; ValueError if two have the same kind."""
    kinds = {payload.kind: payload for payload in payloads}
    if len(kinds) < len(payloads):
        raise ValueError("a contract has one payload per kind")
    return kinds
