"""The schema of a message kind: exactly which tensors and scalars it carries, and what each tells about patients.

Sender and receiver hold the same `Payload`; what differs from it is refused. A payload that a site sends cannot be
made unless every part of it says what it reveals, so that a hospital's policy can never be asked about an unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

import torch

from nightsplit.shared.wire.codecs import Codec
from nightsplit.shared.wire.message import FROM_SITES, Kind


class Reveals(StrEnum):
    """How much a tensor or scalar of a message tells about patients; `TELLS` says it in words."""

    LABELS = "labels"
    ACTIVATIONS = "activations"
    STORED_ACTIVATIONS = "stored_activations"
    GRADIENTS = "gradients"
    WEIGHTS = "weights"
    COUNTS = "counts"
    CIPHERTEXT = "ciphertext"
    NOTHING = "nothing"


TELLS: Mapping[Reveals, str] = {
    Reveals.LABELS: "what is to be predicted, of each patient in a message",
    Reveals.ACTIVATIONS: "outputs of the site's layers for each patient in a message",
    Reveals.STORED_ACTIVATIONS: "activations that the server keeps, to train on them again or to replay the run",
    Reveals.GRADIENTS: "gradients at the head for each patient in a message; labels can be read from them",
    Reveals.WEIGHTS: "weights that patients of the site have shaped, or what training here changed in them",
    Reveals.COUNTS: "numbers of samples, and figures over all held-out patients of the site",
    Reveals.CIPHERTEXT: "values of patients, encrypted: this site alone can decrypt them",
    Reveals.NOTHING: "names, places in a sequence and settings of the run",
}

BATCH = "batch"
"""Name of the dimension along which a tensor holds samples of patients."""

ScalarType = type[bool] | type[int] | type[float] | type[str]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a payload.

    Attributes:
        dtype: dtype before encoding and after decoding.
        shape: a length per dimension; a name stands for any length >= 1 that is the same wherever
            the name occurs in the message, e.g. ("batch", 16, 32, 32). "batch" counts patients' samples.
        codec: how it travels; "raw" keeps its bytes, the others need dtype float32.
        zstd: its encoded bytes are compressed.
        reveals: what it tells about patients; to be said of what a site sends.
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
        reveals: as of a `TensorSpec`.
        low, high: the smallest and the largest value of a number.

    Raises:
        TypeError: limits of what is no number.
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
    """All that a message of one kind carries; floating-point values must be finite.

    Attributes:
        kind: of the message.
        tensors, scalars: its parts by name.
        sets_weights: the server's message replaces weights of layers that work at the site.

    Raises:
        ValueError: a part of what a site sends does not say what it reveals, or a site's message sets weights.
    """

    kind: Kind
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    scalars: Mapping[str, ScalarSpec] = field(default_factory=dict)
    sets_weights: bool = False

    def __post_init__(self) -> None:
        if self.kind not in FROM_SITES:
            return
        if silent := ", ".join(name for name, spec in self._parts if spec.reveals is None):
            raise ValueError(f"{self.kind} leaves a site, so say what it tells of patients (reveals=): {silent}")
        if self.sets_weights:
            raise ValueError(f"{self.kind} is sent by sites: it sets no weights at one")

    @property
    def reveals(self) -> frozenset[Reveals]:
        """What the message tells about patients."""
        return frozenset(spec.reveals for _, spec in self._parts if spec.reveals is not None)

    def samples(self, shapes: Mapping[str, Sequence[int]]) -> int | None:
        """Count patients' samples in a message whose tensors have these shapes; None where it holds none by itself."""
        for name, spec in self.tensors.items():
            if BATCH in spec.shape:
                return shapes[name][spec.shape.index(BATCH)]
        return None

    @property
    def _parts(self) -> list[tuple[str, TensorSpec | ScalarSpec]]:
        return [*self.tensors.items(), *self.scalars.items()]


Contract = Mapping[Kind, Payload]
"""The payload of each kind of message that a run has."""


def contract(*payloads: Payload) -> Contract:
    """Return the contract of these payloads; ValueError where two are of one kind."""
    kinds = {payload.kind: payload for payload in payloads}
    if len(kinds) < len(payloads):
        raise ValueError("a contract has one payload of each kind")
    return kinds
