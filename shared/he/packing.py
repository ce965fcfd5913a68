"""Which number lies in which slot of a ciphertext: known to the site that encrypts and the server that computes.

                 a ciphertext for each        a slot for each                    rotations    best for
    Batch        feature, unit                sequence                           none         hundreds of sequences
    Slots        frame, state                 (dimension, sequence)              a few        some dozen

What a site decrypts from a state may be packed and encrypted again as it is. Both steps are linear: whoever adds
numbers r to all slots before takes `packing.state(packing.read_state(r, packing.capacity))` away afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nightsplit.shared.he.weights import FloatArray


class Packing(Protocol):
    """FloatArray of sequences to slot vectors, each float64 (slots,) and for one ciphertext, and back.

    What is packed has n <= `capacity` sequences; ValueError otherwise. Slots of absent sequences are 0.
    """

    @property
    def capacity(self) -> int:
        """Sequences that fit."""

    @property
    def rotations(self) -> tuple[int, ...]:
        """Steps by which the server rotates; it needs a Galois key for each."""

    def frame(self, numbers: FloatArray) -> list[FloatArray]:
        """Features of one frame, (n, features)."""

    def state(self, numbers: FloatArray) -> list[FloatArray]:
        """h or c, (n, hidden)."""

    def votes(self, numbers: FloatArray) -> FloatArray:
        """The logits so far, (n,); or the logits, which lie in the first n slots of a vector."""

    def read_state(self, vectors: Sequence[FloatArray], n: int) -> FloatArray:
        """h or c of the first n sequences, (n, hidden)."""

    def read_votes(self, vector: FloatArray, n: int) -> FloatArray:
        """The logits so far, (n,)."""


@dataclass(frozen=True)
class Batch:
    """A sequence in each slot; `capacity` is how many slots a ciphertext has."""

    capacity: int
    rotations: tuple[int, ...] = ()

    def frame(self, numbers: FloatArray) -> list[FloatArray]:
        """See `Packing`."""
        return [self.votes(column) for column in numbers.T]

    def state(self, numbers: FloatArray) -> list[FloatArray]:
        """See `Packing`."""
        return self.frame(numbers)

    def votes(self, numbers: FloatArray) -> FloatArray:
        """See `Packing`."""
        return _padded(numbers, self.capacity)

    def read_state(self, vectors: Sequence[FloatArray], n: int) -> FloatArray:
        """See `Packing`."""
        return np.stack([vector[:n] for vector in vectors], axis=1)

    def read_votes(self, vector: FloatArray, n: int) -> FloatArray:
        """See `Packing`."""
        return vector[:n]


@dataclass(frozen=True)
class Slots:
    """Slot = dimension * capacity + sequence, so that a rotation by `capacity` moves every number one dimension down.

    Features and units are repeated until all dimensions are full: a matrix of few columns then needs few
    diagonals (Halevi and Shoup, CRYPTO 2014). The four gates of a unit lie `units` dimensions apart.

    Attributes:
        slots: of a ciphertext, a power of two.
        features: of a frame.
        hidden: units of the LSTM.
    """

    slots: int
    features: int
    hidden: int

    def __post_init__(self) -> None:
        if self.dimensions > self.slots:
            raise ValueError(f"{self.dimensions} dimensions do not fit into {self.slots} slots")

    @property
    def period(self) -> int:
        """After so many dimensions the features are repeated: a power of two."""
        return _power_of_two(self.features)

    @property
    def units(self) -> int:
        """After so many dimensions the units are repeated: a power of two."""
        return max(_power_of_two(self.hidden), _power_of_two(self.features) // 4, 1)

    @property
    def dimensions(self) -> int:
        """Of a ciphertext: a place for each gate of each unit, and for each feature."""
        return 4 * self.units

    @property
    def capacity(self) -> int:
        """See `Packing`."""
        return self.slots // self.dimensions

    @property
    def small(self) -> int:
        """Dimensions of a giant step; baby steps go one by one, and about as often."""
        return int(2 ** ((max(self.period, self.units).bit_length() - 1) // 2))

    @property
    def rotations(self) -> tuple[int, ...]:
        """See `Packing`: baby step, giant step, and from gate to gate."""
        return tuple(step * self.capacity for step in sorted({1, self.small, self.units}))

    def frame(self, numbers: FloatArray) -> list[FloatArray]:
        """See `Packing`."""
        return [self._repeated(numbers, self.period)]

    def state(self, numbers: FloatArray) -> list[FloatArray]:
        """See `Packing`."""
        return [self._repeated(numbers, self.units)]

    def votes(self, numbers: FloatArray) -> FloatArray:
        """See `Packing`."""
        return _padded(_padded(numbers, self.capacity), self.slots)

    def read_state(self, vectors: Sequence[FloatArray], n: int) -> FloatArray:
        """See `Packing`; what lies in other dimensions than those of the units is of no use."""
        (vector,) = vectors
        return self._by_dimension(vector)[: self.hidden, :n].T

    def read_votes(self, vector: FloatArray, n: int) -> FloatArray:
        """See `Packing`; the parts of the sum lie in all dimensions."""
        votes: FloatArray = self._by_dimension(vector).sum(0)[:n]
        return votes

    def _repeated(self, numbers: FloatArray, period: int) -> FloatArray:
        once = np.zeros((period, self.capacity))
        for row, column in zip(once, numbers.T, strict=False):
            row[:] = _padded(column, self.capacity)
        return np.tile(once, (self.dimensions // period, 1)).ravel()

    def _by_dimension(self, vector: FloatArray) -> FloatArray:
        return vector.reshape(self.dimensions, self.capacity)


def _padded(numbers: FloatArray, length: int) -> FloatArray:
    if len(numbers) > length:
        raise ValueError(f"{len(numbers)} sequences, and room for {length}")
    return np.pad(numbers, (0, length - len(numbers)))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
