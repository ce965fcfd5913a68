"""The run store: what servers, sites and the console know of a run besides its messages.

    status     what each worker last said of itself, and when
    lease      which server is active; its number, the fence, grows with every take-over
    pointer    the newest checkpoint that counts, moved only by the holder of the fence
    journal    the order in which a server applied messages, where timing decides it, and at which
               place of that order it left a site out; a position is filled once

One interface, three stores (memory, SQLite, Redis), one conformance suite.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from nightsplit.shared.run_store.status import WorkerStatus
from nightsplit.shared.storage.checkpoint import Pointer

SILENT_SECONDS = 10.0
"""A worker speaks every second; one that was silent for so long is not there."""


@dataclass(frozen=True, slots=True)
class Status:
    """What a worker last said of itself.

    Attributes:
        worker: site name, or "server".
        report: its words; `status.UNREADABLE` when they cannot be read.
        age_seconds: how long ago, by the store's own clock.
    """

    worker: str
    report: WorkerStatus
    age_seconds: float

    @property
    def online(self) -> bool:
        """Whether the worker is there: it spoke lately, and not to say that it leaves."""
        return self.age_seconds < SILENT_SECONDS and not self.report.phase.has_left


def age_seconds(now: float, written: float) -> float:
    """Seconds since `written`, which a worker may have falsified: at least 0, at most since 1970."""
    return min(max(0.0, now - written), now)


class RunStore(ABC):
    """State of one run shared by its workers. Safe to use from several processes.

    Every method raises `BrokerError` 207 when the store cannot be reached.
    """

    @abstractmethod
    def put_status(self, worker: str, status: WorkerStatus) -> None:
        """Replace what is known of `worker`."""

    @abstractmethod
    def statuses(self, workers: Iterable[str]) -> dict[str, Status]:
        """What is known of each of these workers; one that never spoke is left out.

        Whatever stands in a worker's record, reading it raises nothing: see `status.read_status`.
        """

    @abstractmethod
    def now(self) -> float:
        """The store's own wall clock, in seconds since 1970."""

    @abstractmethod
    def acquire_lease(self, owner: str, ttl_seconds: float) -> int | None:
        """Become the active server. Returns the new fence, larger than every earlier one.

        None when another owner's lease has not run out. The same owner always succeeds: it
        was restarted.
        """

    @abstractmethod
    def renew_lease(self, owner: str, fence: int, ttl_seconds: float) -> bool:
        """Stay the active server; False when another took over, which cannot be undone."""

    @abstractmethod
    def release_lease(self, owner: str, fence: int) -> None:
        """Stop being the active server; harmless when another took over."""

    @abstractmethod
    def pointer(self) -> Pointer | None:
        """The newest checkpoint that counts."""

    @abstractmethod
    def move_pointer(self, pointer: Pointer) -> bool:
        """Make a checkpoint count. False, and nothing moved, when a higher fence was handed out."""

    @abstractmethod
    def journal(self, position: int, sender: str) -> str:
        """Fill `position` (1, 2, 3...) with `sender` unless it is filled; returns what is there, durably."""

    @abstractmethod
    def journalled(self, position: int) -> str | None:
        """What the journal holds at `position`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the store."""
