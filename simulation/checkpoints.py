"""Checkpoints and sent messages in memory, which outlive a worker, not the process."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from typing_extensions import override

from nightsplit.shared.errors import StateError
from nightsplit.shared.storage.checkpoint import Checkpoints, Pointer, Snapshot
from nightsplit.shared.storage.sent import SentMessages


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


SentByPlace = dict[tuple[str, int], tuple[str, bytes]]
"""Id and body of messages, by receiver and seq."""


class MemorySent(SentMessages):
    """Sent messages of one process of a worker, over those that its processes have in common."""

    def __init__(self, synced: SentByPlace) -> None:
        super().__init__(Path("memory"))
        self._synced = synced

    @override
    def find(self, receiver: str, seq: int) -> tuple[str, bytes] | None:
        return self.unsynced.get((receiver, seq)) or self._synced.get((receiver, seq))

    @override
    def release(self, receiver: str, last: int) -> None:
        for key in [key for key in self._synced if key[0] == receiver and key[1] <= last]:
            del self._synced[key]

    @override
    def sync(self) -> None:
        self._synced.update(self.unsynced)
        self.unsynced.clear()
