"""Run store in memory, for workers that share one process."""

import threading
import time
from collections.abc import Iterable

from typing_extensions import override

from nightsplit.shared.run_store.base import RunStore, Status
from nightsplit.shared.run_store.status import WorkerStatus, read_status, write_status
from nightsplit.shared.storage.checkpoint import Pointer


class MemoryStore(RunStore):
    """Run store that outlives its users, not the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[str, tuple[str, float]] = {}
        self._fence = 0
        self._owner: str | None = None
        self._expires = 0.0
        self._pointer: Pointer | None = None
        self._journal: dict[int, str] = {}

    @override
    def put_status(self, worker: str, status: WorkerStatus) -> None:
        with self._lock:
            self._statuses[worker] = (write_status(status), time.monotonic())

    @override
    def statuses(self, workers: Iterable[str]) -> dict[str, Status]:
        with self._lock:
            now = time.monotonic()
            known = {name: self._statuses[name] for name in workers if name in self._statuses}
            return {name: Status(name, read_status(record, name), now - then) for name, (record, then) in known.items()}

    @override
    def now(self) -> float:
        return time.time()

    @override
    def acquire_lease(self, owner: str, ttl_seconds: float) -> int | None:
        with self._lock:
            now = time.monotonic()
            if self._owner not in (None, owner) and now < self._expires:
                return None
            self._fence += 1
            self._owner, self._expires = owner, now + ttl_seconds
            return self._fence

    @override
    def renew_lease(self, owner: str, fence: int, ttl_seconds: float) -> bool:
        with self._lock:
            if (owner, fence) != (self._owner, self._fence):
                return False
            self._expires = time.monotonic() + ttl_seconds
            return True

    @override
    def release_lease(self, owner: str, fence: int) -> None:
        with self._lock:
            if (owner, fence) == (self._owner, self._fence):
                self._owner = None

    @override
    def pointer(self) -> Pointer | None:
        with self._lock:
            return self._pointer

    @override
    def move_pointer(self, pointer: Pointer) -> bool:
        with self._lock:
            if pointer.fence < self._fence:
                return False
            self._pointer = pointer
            return True

    @override
    def claim_position(self, position: int, entry: str) -> str:
        with self._lock:
            return self._journal.setdefault(position, entry)

    @override
    def journal_entry(self, position: int) -> str | None:
        with self._lock:
            return self._journal.get(position)

    @override
    def close(self) -> None:
        """Do nothing, since other workers may share the object."""
