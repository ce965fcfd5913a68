"""Checkpoints: atomic, verified snapshots on disk.

    <folder>/<fence>-<counter>/tensors.safetensors   every tensor of the snapshot
                              /manifest.json         facts, engine state, SHA-256 of both

A checkpoint is written as a draft, forced to disk and renamed, so that it exists whole or not at all.
Where several servers could write, it is valid only once a `Pointer` in the run store (fence, counter,
SHA-256 of the manifest) names it or a later one (docs/explanation/delivery.md, rule 7). When the newest is
damaged, the one before it is used.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nightsplit.shared import crash_points
from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.files import force_to_disk, make_private_folder, write_new
from nightsplit.shared.storage.sqlite import is_full
from nightsplit.shared.storage.tensors import as_safetensors

TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"

_NAME = re.compile(r"\d+-\d+")


@dataclass(frozen=True, slots=True)
class Pointer:
    """Identity of the newest valid checkpoint: fence of its writer, counter, and SHA-256 of its manifest."""

    fence: int
    counter: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of a worker: CPU tensors by name, never changed after the snapshot was taken, and JSON values by name."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Checkpoints:
    """Checkpoints of one worker in one run, in a folder for this worker alone."""

    keep = 2
    """Number of checkpoints kept, so that an intact one remains when the newest is damaged."""
    interval_seconds = 30.0
    """Longest time between two while there is something to save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[Path] = set()

    def write(self, fence: int, counter: int, snapshot: Snapshot) -> Pointer:
        """Write a snapshot durably; StateError 501 if the disk is full, which leaves older checkpoints intact."""
        path = self._path(fence, counter)
        draft = self.folder / f".{path.name}.draft"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            make_private_folder(self.folder)
            make_private_folder(draft)
            write_new(draft / TENSORS, as_safetensors(snapshot.tensors))
            facts = json.loads(_canonical(snapshot.facts))  # as it will be read: a number as a key becomes text
            sha256s = {"facts_sha256": _hash(_canonical(facts)), "tensors_sha256": _sha256(draft / TENSORS)}
            manifest = _canonical({"facts": facts, **sha256s})
            write_new(draft / MANIFEST, manifest)
            crash_points.reach("checkpoint_written")
            force_to_disk(draft)
            crash_points.reach("checkpoint_synced")
            shutil.rmtree(path, ignore_errors=True)
            crash_points.reach("before_rename")
            draft.rename(path)
            crash_points.reach("after_rename")
            force_to_disk(self.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise _write_failed(error, self.folder, snapshot) from None
        self._damaged.discard(path)
        return Pointer(fence, counter, _hash(manifest))

    def prune(self) -> None:
        """Remove all but the newest `keep` intact checkpoints; `load` finds the damaged ones."""
        intact = [path for path in self._paths() if path not in self._damaged]
        for path in [*self._damaged, *intact[: -self.keep]]:
            shutil.rmtree(path, ignore_errors=True)
        self._damaged.clear()

    def load(self, pointer: Pointer | None = None) -> tuple[Pointer, Snapshot, list[str]] | None:
        """Read the newest intact checkpoint.

        Args:
            pointer: the newest valid one; None where this worker is the only writer.

        Returns:
            Its pointer, its content, and the name and damage of each checkpoint skipped before it; None when
            nothing was ever written.

        Raises:
            StateError: 502 there are checkpoints, and all are damaged.
        """
        damaged: list[str] = []
        paths = self._paths()
        if pointer is not None and self._path(pointer.fence, pointer.counter) not in paths:
            damaged.append(f"{self._path(pointer.fence, pointer.counter).name}: is missing")
        for path in reversed(paths):
            fence, counter = _numbers(path)
            if pointer is not None and (fence, counter) > (pointer.fence, pointer.counter):
                continue  # written, but the pointer was never moved to it
            try:
                snapshot, sha256 = _read(path)
                found = Pointer(fence, counter, sha256)
                if pointer is not None and (fence, counter) == (pointer.fence, pointer.counter) and found != pointer:
                    raise ValueError("not the one that the run store names")
            except (OSError, ValueError, SafetensorError) as error:
                self._damaged.add(path)
                damaged.append(f"{path.name}: {_explain(error)}")
                continue
            return found, snapshot, damaged
        if damaged:
            sentence = f"{self.folder}: {'; '.join(damaged)}."
            remedy = "restore the folder from a backup, or start a new run under another id. No run restarts silently."
            raise StateError(502, sentence, remedy)
        return None

    @property
    def last_fence(self) -> int:
        """Highest fence of the checkpoints in the folder, valid or not; 0 for none."""
        return max((_numbers(path)[0] for path in self._paths()), default=0)

    def _path(self, fence: int, counter: int) -> Path:
        return self.folder / f"{fence:06d}-{counter:09d}"

    def _paths(self) -> list[Path]:
        """Return the checkpoint folders, oldest first, without drafts and foreign files."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)), key=_numbers)


def _numbers(path: Path) -> tuple[int, int]:
    fence, _, counter = path.name.partition("-")
    return int(fence), int(counter)


def _read(path: Path) -> tuple[Snapshot, str]:
    content = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(content)
        facts, sha256s = manifest["facts"], (manifest["facts_sha256"], manifest["tensors_sha256"])
    except (ValueError, KeyError, TypeError):
        raise ValueError("the manifest is damaged") from None
    if _hash(_canonical(facts)) != sha256s[0]:
        raise ValueError("the manifest is damaged")
    if _sha256(path / TENSORS) != sha256s[1]:
        raise ValueError("the tensors are damaged")
    return Snapshot(load_file(path / TENSORS), facts), _hash(content)


def _canonical(content: object) -> bytes:
    """Return JSON that stays equal when it is read and written again."""
    return json.dumps(content, sort_keys=True).encode()


def _explain(error: Exception) -> str:
    """Describe a damage in one clause without foreign text, since other workers read it in the run store."""
    if isinstance(error, SafetensorError):
        return "the tensors cannot be read"
    if isinstance(error, OSError):
        return f"{Path(error.filename).name}: {error.strerror}" if error.filename is not None else str(error.strerror)
    return str(error)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_failed(error: OSError, folder: Path, snapshot: Snapshot) -> StateError:
    needed = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    reason = "is full" if is_full(error) else f"cannot be written ({error.strerror})"
    sentence = f"{folder} {reason}; a checkpoint needs {needed / 2**20:.1f} MiB. The last checkpoint is intact."
    return StateError(501, sentence, "make room on that disk, then start the worker again: it continues where it was.")


def flatten(prefix: str, tensors: Mapping[str, torch.Tensor] | Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return CPU copies under `prefix/`, as entries of `Snapshot.tensors`."""
    return {f"{prefix}/{name}": tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors that `flatten` stored under `prefix/`."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
