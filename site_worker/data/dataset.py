"""A site's data in memory: one row per sample, and the patient of each row."""

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
        inputs: float32 (n, features), (n, 1, height, width), or (n, frames, height, width); NaN where a value
            is missing.
        targets: float32 (n,) for regression (in the label's own unit) and binary (0. or 1.),
            int64 (n,) for multiclass, float32 (n, height, width) of 0. and 1. for segmentation.
        patients: name of the patient of each row; the rows of a patient stay together in every split.
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
        """Return the rows at `indices`, in that order."""
        rows = torch.tensor(list(indices), dtype=torch.int64)
        return Dataset(self.inputs[rows], self.targets[rows], tuple(self.patients[i] for i in indices))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all contents in order. It must stay at the site: a hash can confirm a guess of the data."""
        digest = hashlib.sha256()
        for tensor in (self.inputs, self.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        for patient in self.patients:
            digest.update(f"{len(patient)}:{patient}".encode())
        return digest.hexdigest()

    def check_fingerprint(self, fingerprint: str) -> None:
        """Check that the data is that of the start of the run; DataError 409 if it has changed."""
        if self.fingerprint != fingerprint:
            sentence = f"the data's fingerprint is {self.fingerprint[:12]}, the run began with {fingerprint[:12]}."
            raise DataError(409, sentence, "restore the files as they were, or start a new run with the new data.")


@dataclass(frozen=True, eq=False)
class Splits:
    """Dataset divided by patient; a split with share 0 is empty."""

    train: Dataset
    validation: Dataset
    test: Dataset

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples of each split, by the split's name in texts."""
        return {"training": len(self.train), "validation": len(self.validation), "test": len(self.test)}
