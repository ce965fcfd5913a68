"""Checkpoints in memory, which outlive a worker, not the process."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from typing_extensions import override

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.checkpoint import Checkpoints, Pointer, Snapshot


class MemoryCheckpoints(Checkpoints):
    """Checkpoints of one worker in a dictionary. Nothing can damage them, so nothing is hashed."""

    def __init__(self) -> None:
        super().__init__(Path("memory"))
        self._kept: dict[tuple[int, int], tuple[Mapping[str, torch.Tensor], str]] = {}

    @override
    def write(self, fence: int, counter: int, snapshot: Snapshot) -> Pointer:
        self._kept[fence, counter] = snapshot.tensors, json.dumps(snapshot.facts, sort_keys=True)
        return Pointer(fence, counter, "")

    @override
    def prune(self) -> None:
        for numbers in sorted(self._kept)[: -self.keep]:
            del self._kept[numbers]

    @override
    def load(self, pointer: Pointer | None = None) -> tuple[Pointer, Snapshot, list[str]] | None:
        numbers = (pointer.fence, pointer.counter) if pointer is not None else max(self._kept, default=None)
        if numbers is None:
            return None
        if numbers not in self._kept:
            raise StateError(502, f"checkpoint {numbers} is gone.", "start a new run: this one's state was in memory.")
        tensors, written = self._kept[numbers]
        snapshot = Snapshot({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(written))
        return Pointer(*numbers, ""), snapshot, []

    @property
    @override
    def last_fence(self) -> int:
        return max((fence for fence, _ in self._kept), default=0)
