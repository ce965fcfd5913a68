"""A site's data in memory: one row per sample, and the patient each row belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from nightsplit.shared.errors import DataError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of one site.

    Attributes:
        inputs: float32 (n, features), (n, 1, height, width), or (n, frames, height, width); NaN is a value
            that was not measured.
        targets: float32 (n,) for regression (in the label's own unit) and binary (0. or 1.),
            int64 (n,) for multiclass, float32 (n, height, width) of 0. and 1. for segmentation.
        patients: n names; rows with the same name belong together in every split.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    patients: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.targets) == len(self.patients):
            raise ValueError("inputs, targets and patients differ in length")

    def __len__(self) -> int:
        return len(self.patients)

    def select(self, indices: Sequence[int]) -> Dataset:
        """The rows at `indices`, in that order."""
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        return Dataset(self.inputs[chosen], self.targets[chosen], tuple(self.patients[i] for i in indices))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all contents in order. It stays at the site: a hash confirms a guess of the data."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        for patient in self.patients:
            digest.update(f"{len(patient)}:{patient}".encode())
        return digest.hexdigest()

    def expect(self, fingerprint: str) -> None:
        """Check that this is the data a run began with; DataError 409 where it changed in between."""
        if self.fingerprint != fingerprint:
            what = f"the data's fingerprint is {self.fingerprint[:12]}, the run began with {fingerprint[:12]}."
            raise DataError(409, what, "restore the files as they were, or start a new run with the new data.")


@dataclass(frozen=True, eq=False)
class Splits:
    """A dataset divided by patient; a part whose share is 0 is empty."""

    train: Dataset
    validation: Dataset
    test: Dataset

    @property
    def counts(self) -> dict[str, int]:
        """Samples of each part, by what a user calls it."""
        return {"training": len(self.train), "validation": len(self.validation), "test": len(self.test)}
