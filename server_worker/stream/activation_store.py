"""Store of released activations on the server's disk, which are trained on many times.

There is one safetensors file per message, read by memory mapping: the store may be larger than memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import make_private_folder, write_atomic
from nightsplit.shared.storage.tensors import as_safetensors

Row = tuple[str, int, int]
"""Stored sample: site, item, row."""


class ActivationStore:
    """Released activations of one run, in a folder that only its server uses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, site: str, q: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store item q of a site durably; StateError 501 when the disk is full, which leaves earlier items intact."""
        path = self._path(site, q)
        try:
            make_private_folder(path.parent)
            write_atomic(path, as_safetensors(tensors))
        except OSError as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            sentence = f"{path} cannot be written ({error.strerror}); it needs {size / 2**20:.1f} MiB."
            fix = "make room on that disk, then start the server again: it continues where it was."
            raise StateError(501, sentence, fix) from None

    def get(self, site: str, q: int, rows: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
        """Return item q of a site with all its rows, or only with `rows`, in their order."""
        with safe_open(self._path(site, q), framework="pt") as file:
            if rows is None:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: torch.stack([part[row] for row in rows]) for name, part in slices.items()}

    def has(self, site: str, q: int) -> bool:
        """Return whether item q of a site is there."""
        return self._path(site, q).exists()

    def items(self, site: str) -> list[int]:
        """Return the numbers of a site's items."""
        return [int(path.stem) for path in (self._folder / site).glob("*.safetensors")]

    def remove(self, site: str, q: int) -> None:
        """Remove item q of a site, if it is there."""
        self._path(site, q).unlink(missing_ok=True)

    def gather(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return smashed data (batch, *cut) and targets (batch,) of the rows, in their order."""
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

    def _path(self, site: str, q: int) -> Path:
        return self._folder / site / f"{q:09d}.safetensors"
