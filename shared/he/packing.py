"""Packing of numbers into the slots of ciphertexts, the same for the encrypting site and the computing server.

                 a ciphertext for each        a slot for each                    rotations    best for
    Batch        feature, unit                sequence                           none         hundreds of sequences
    Slots        frame, state                 (dimension, sequence)              a few        some dozen

A site may decrypt a state, unpack it, pack it again and encrypt it. Both packings are linear: a server that added
numbers r to all slots before subtracts `packing.state(packing.read_state(r, packing.capacity))` afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from typing_extensions import override

from nightsplit.shared.he.weights import FloatArray


class Packing(Protocol):
    """Map between arrays of sequences and slot vectors, each float64 (slots,) for one ciphertext.

    An array has n <= `capacity` sequences; ValueError otherwise. Slots of absent sequences are 0.
    """

    @property
    def capacity(self) -> int:
        """Largest number of sequences."""

    @property
    def rotations(self) -> tuple[int, ...]:
        """Steps by which the server rotates, none by default; it needs a Galois key for each."""
        return ()

    def frame(self, numbers: FloatArray) -> list[FloatArray]:
        """Pack the features of one frame, (n, features)."""

    def state(self, numbers: FloatArray) -> list[FloatArray]:
        """Pack h or c, (n, hidden)."""

    def votes(self, numbers: FloatArray) -> FloatArray:
        """Pack partial or final logits, (n,), into the first n slots of a vector."""

    def read_state(self, vectors: Sequence[FloatArray], n: int) -> FloatArray:
        """Unpack h or c of the first n sequences, (n, hidden)."""

    def read_votes(self, vector: FloatArray, n: int) -> FloatArray:
        """Unpack the logits of the first n sequences, (n,)."""


@dataclass(frozen=True)
class Batch(Packing):
    """Packing of one sequence per slot, in ciphertexts of so many slots."""

    slots: int

    @property
    @override
    def capacity(self) -> int:
        return self.slots

    @override
    def frame(self, numbers: FloatArray) -> list[FloatArray]:
        return [self.votes(column) for column in numbers.T]

    @override
    def state(self, numbers: FloatArray) -> list[FloatArray]:
        return self.frame(numbers)

    @override
    def votes(self, numbers: FloatArray) -> FloatArray:
        return _pad(numbers, self.slots)

    @override
    def read_state(self, vectors: Sequence[FloatArray], n: int) -> FloatArray:
        return np.stack([vector[:n] for vector in vectors], axis=1)

    @override
    def read_votes(self, vector: FloatArray, n: int) -> FloatArray:
        return vector[:n]


@dataclass(frozen=True)
class Slots(Packing):
    """Packing with slot = dimension * capacity + sequence: a rotation by `capacity` moves numbers one dimension down.

    Features and units are repeated until all dimensions are full: a matrix of few columns then needs few
    diagonals (Halevi and Shoup, CRYPTO 2014). The four gates of a unit lie `units` dimensions apart.

    Attributes:
        slots: slots of a ciphertext, a power of two.
        features: features of a frame.
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
        """Dimensions after which the features are repeated, a power of two."""
        return _power_of_two(self.features)

    @property
    def units(self) -> int:
        """Dimensions after which the units are repeated, a power of two."""
        return max(_power_of_two(self.hidden), _power_of_two(self.features) // 4, 1)

    @property
    def dimensions(self) -> int:
        """Dimensions of a ciphertext: at least one for each gate of each unit, and for each feature."""
        return 4 * self.units

    @property
    @override
    def capacity(self) -> int:
        return self.slots // self.dimensions

    @property
    def giant_step(self) -> int:
        """Dimensions of a giant step; there are about as many baby steps, of one dimension each."""
        return int(2 ** ((max(self.period, self.units).bit_length() - 1) // 2))

    @property
    @override
    def rotations(self) -> tuple[int, ...]:
        # Baby step, giant step, and from gate to gate.
        return tuple(step * self.capacity for step in sorted({1, self.giant_step, self.units}))

    @override
    def frame(self, numbers: FloatArray) -> list[FloatArray]:
        return [self._repeat(numbers, self.period)]

    @override
    def state(self, numbers: FloatArray) -> list[FloatArray]:
        return [self._repeat(numbers, self.units)]

    @override
    def votes(self, numbers: FloatArray) -> FloatArray:
        return _pad(_pad(numbers, self.capacity), self.slots)

    @override
    def read_state(self, vectors: Sequence[FloatArray], n: int) -> FloatArray:
        (vector,) = vectors  # dimensions after those of the units hold no state
        return self._by_dimension(vector)[: self.hidden, :n].T

    @override
    def read_votes(self, vector: FloatArray, n: int) -> FloatArray:
        votes: FloatArray = self._by_dimension(vector).sum(0)[:n]  # the server leaves the terms in all dimensions
        return votes

    def _repeat(self, numbers: FloatArray, period: int) -> FloatArray:
        once = np.zeros((period, self.capacity))
        for row, column in zip(once, numbers.T, strict=False):
            row[:] = _pad(column, self.capacity)
        return np.tile(once, (self.dimensions // period, 1)).ravel()

    def _by_dimension(self, vector: FloatArray) -> FloatArray:
        return vector.reshape(self.dimensions, self.capacity)


def _pad(numbers: FloatArray, length: int) -> FloatArray:
    if len(numbers) > length:
        raise ValueError(f"{len(numbers)} sequences, but a capacity of {length}")
    return np.pad(numbers, (0, length - len(numbers)))


def _power_of_two(minimum: int) -> int:
    return 1 << (minimum - 1).bit_length()
