"""Activations that were released once, on the server's disk, to be trained on many times.

One safetensors file per message, read by memory mapping: the store may be larger than memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.storage.tensors import as_safetensors

Row = tuple[str, int, int]
"""A stored sample: site, item, row."""


class ActivationStore:
    """The released activations of one run, in a folder that belongs to its server alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, site: str, q: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store item q of a site durably, once for all; StateError 501: the disk is full, earlier items are intact."""
        place = self._place(site, q)
        try:
            make_private_folder(place.parent)
            write_atomic(place, as_safetensors(tensors))
        except OSError as error:
            needed = sum(tensor.nbytes for tensor in tensors.values())
            what = f"{place} cannot be written ({error.strerror}); it needs {needed / 2**20:.1f} MiB."
            remedy = "make room on that disk, then start the server again: it continues where it was."
            raise StateError(501, what, remedy) from None

    def get(self, site: str, q: int, rows: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """Item q of a site: all its rows, or only these, in this order."""
        with safe_open(self._place(site, q), framework="pt") as file:
            if rows is None:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: torch.stack([part[row] for row in rows]) for name, part in slices.items()}

    def gather(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Smashed data (batch, *cut) and targets (batch,) of these rows, in this order."""
        by_file: dict[tuple[str, int], list[int]] = {}
        for position, (site, q, _) in enumerate(rows):
            by_file.setdefault((site, q), []).append(position)
        parts = {}
        for (site, q), positions in by_file.items():
            stored = self.get(site, q, [rows[position][2] for position in positions])
            for offset, position in enumerate(positions):
                parts[position] = stored["smashed"][offset], stored["targets"][offset]
        smashed, targets = zip(*(parts[position] for position in range(len(rows))), strict=True)
        return torch.stack(smashed), torch.stack(targets)

    def _place(self, site: str, q: int) -> Path:
        return self._folder / site / f"{q:09d}.safetensors"
