"""Checkpoints: atomic, verified snapshots on disk.

    <folder>/<fence>-<counter>/tensors.safetensors   every tensor of the snapshot
                              /manifest.json         facts, engine state, sha256 of both

A checkpoint is written beside its place, forced to disk, and renamed: it is there whole or not at
all. Its name alone does not make it count: a `Pointer` (fence, counter, sha256 of the manifest)
kept in the run store does, where several servers could write (docs/explanation/delivery.md, rule 7).
When the newest is damaged, the one before it is used.
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
    """The newest checkpoint that counts: who wrote it, which one, and its hash."""

    fence: int
    counter: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State as plain data.

    Attributes:
        tensors: CPU tensors by name, never changed after the snapshot was taken.
        facts: what JSON can hold, by name.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one worker in one run, in a folder that belongs to this worker alone."""

    keep = 2
    """How many stay; a damaged newest one costs nothing while an older one is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._damaged: set[Path] = set()

    def write(self, fence: int, counter: int, snapshot: Snapshot) -> Pointer:
        """Make a snapshot durable; StateError 501 where the disk is full, which leaves older checkpoints intact."""
        place = self._place(fence, counter)
        draft = self.folder / f".{place.name}.draft"
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
            shutil.rmtree(place, ignore_errors=True)
            crash_points.reach("before_rename")
            draft.rename(place)
            crash_points.reach("after_rename")
            force_to_disk(self.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise _write_failed(error, self.folder, snapshot) from None
        self._damaged.discard(place)
        return Pointer(fence, counter, _hash(manifest))

    def prune(self) -> None:
        """Remove all but the newest `keep`; one that `load` found damaged is none of them."""
        sound = [place for place in self._places() if place not in self._damaged]
        for place in [*self._damaged, *sound[: -self.keep]]:
            shutil.rmtree(place, ignore_errors=True)
        self._damaged.clear()

    def load(self, pointer: Pointer | None = None) -> tuple[Pointer, Snapshot, list[str]] | None:
        """The newest valid checkpoint that counts, and what was passed over on the way to it.

        Args:
            pointer: the newest one that counts; None where this worker is the only writer.

        Returns:
            None when nothing was ever written.

        Raises:
            StateError: 502 there were checkpoints, and none of them can be trusted.
        """
        damaged: list[str] = []
        places = self._places()
        if pointer is not None and self._place(pointer.fence, pointer.counter) not in places:
            damaged.append(f"{self._place(pointer.fence, pointer.counter).name}: is missing")
        for place in reversed(places):
            fence, counter = _numbers(place)
            if pointer is not None and (fence, counter) > (pointer.fence, pointer.counter):
                continue  # written, but its pointer was never moved: it does not count
            try:
                snapshot, sha256 = _read(place)
                found = Pointer(fence, counter, sha256)
                if pointer is not None and (fence, counter) == (pointer.fence, pointer.counter) and found != pointer:
                    raise ValueError("not the one that the run store names")
            except (OSError, ValueError, SafetensorError) as error:
                self._damaged.add(place)
                damaged.append(f"{place.name}: {_explain(error)}")
                continue
            return found, snapshot, damaged
        if damaged:
            what = f"{self.folder}: {'; '.join(damaged)}."
            remedy = "restore the folder from a backup, or start a new run under another id. No run restarts silently."
            raise StateError(502, what, remedy)
        return None

    @property
    def last_fence(self) -> int:
        """Highest fence of a checkpoint that is here, whether it counts or not; 0 for none."""
        return max((_numbers(place)[0] for place in self._places()), default=0)

    def _place(self, fence: int, counter: int) -> Path:
        return self.folder / f"{fence:06d}-{counter:09d}"

    def _places(self) -> list[Path]:
        """Checkpoint folders, oldest first. Drafts, and what somebody put beside them, are none."""
        if not self.folder.is_dir():
            return []
        return sorted((place for place in self.folder.iterdir() if _NAME.fullmatch(place.name)), key=_numbers)


def _numbers(place: Path) -> tuple[int, int]:
    fence, _, counter = place.name.partition("-")
    return int(fence), int(counter)


def _read(place: Path) -> tuple[Snapshot, str]:
    content = (place / MANIFEST).read_bytes()
    try:
        manifest = json.loads(content)
        facts, sha256s = manifest["facts"], (manifest["facts_sha256"], manifest["tensors_sha256"])
    except (ValueError, KeyError, TypeError):
        raise ValueError("the manifest is damaged") from None
    if _hash(_canonical(facts)) != sha256s[0]:
        raise ValueError("the manifest is damaged")
    if _sha256(place / TENSORS) != sha256s[1]:
        raise ValueError("the tensors are damaged")
    return Snapshot(load_file(place / TENSORS), facts), _hash(content)


def _canonical(content: object) -> bytes:
    """JSON that is the same again after it was read."""
    return json.dumps(content, sort_keys=True).encode()


def _explain(error: Exception) -> str:
    """One clause on what is wrong with a checkpoint, in our own words: other workers may read it in the run store."""
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
    what = "is full" if is_full(error) else f"cannot be written ({error.strerror})"
    return StateError(
        501,
        f"{folder} {what}; a checkpoint needs {needed / 2**20:.1f} MiB. The last checkpoint is intact.",
        "make room on that disk, then start the worker again: it continues where it was.",
    )


def flatten(prefix: str, tensors: Mapping[str, torch.Tensor] | Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Entries for `Snapshot.tensors`: CPU copies under `prefix/`."""
    return {f"{prefix}/{name}": tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries that `flatten` stored under `prefix/`."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
