"""Run store: state of a run that servers, sites and the console share besides its messages.

    status     last report of each worker, and its time
    lease      the active server; its number, the fence, grows with every take-over
    pointer    the newest valid checkpoint, moved only by the holder of the fence
    journal    the order in which a server applied messages and excluded sites, where timing decides
               it; a position is filled once

One interface, three stores (memory, SQLite, Redis), one conformance suite.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from nightsplit.shared.run_store.status import WorkerStatus
from nightsplit.shared.storage.checkpoint import Pointer

SILENT_SECONDS = 10.0
"""Silence after which a worker counts as offline; it reports every second."""


@dataclass(frozen=True, slots=True)
class Status:
    """Last report of a worker (`UNREADABLE` if it cannot be read), and its age by the store's own clock."""

    worker: str
    report: WorkerStatus
    age_seconds: float

    @property
    def online(self) -> bool:
        """True if the worker has reported lately, and has not left."""
        return self.age_seconds < SILENT_SECONDS and not self.report.phase.has_left


def age_seconds(now: float, written: float) -> float:
    """Return the seconds since `written`, which a worker may have falsified: at least 0, at most since 1970."""
    return min(max(0.0, now - written), now)


class RunStore(ABC):
    """State of one run shared by its workers. Safe to use from several processes.

    Every method raises `BrokerError` 207 when the store cannot be reached.
    """

    @abstractmethod
    def put_status(self, worker: str, status: WorkerStatus) -> None:
        """Replace the status of `worker`."""

    def admit(self, workers: Iterable[str]) -> None:  # noqa: B027  (a store without users admits all workers)
        """Allow these workers to report; a server does it where a site may replace its status, and not create it."""

    @abstractmethod
    def statuses(self, workers: Iterable[str]) -> dict[str, Status]:
        """Return the status of each of these workers, without those that never reported.

        No content of a record raises an error: see `status.read_status`.
        """

    @abstractmethod
    def now(self) -> float:
        """Return the store's own wall clock, in seconds since 1970."""

    @abstractmethod
    def acquire_lease(self, owner: str, ttl_seconds: float) -> int | None:
        """Become the active server and return the new fence, larger than every earlier one.

        Return None while another owner's lease runs. The same owner always succeeds: it was restarted.
        """

    @abstractmethod
    def renew_lease(self, owner: str, fence: int, ttl_seconds: float) -> bool:
        """Stay the active server; return False if another took over, which is final."""

    @abstractmethod
    def release_lease(self, owner: str, fence: int) -> None:
        """Stop being the active server; do nothing if another took over."""

    @abstractmethod
    def pointer(self) -> Pointer | None:
        """Return the pointer to the newest valid checkpoint."""

    @abstractmethod
    def move_pointer(self, pointer: Pointer) -> bool:
        """Make a checkpoint the newest valid one; return False, and change nothing, if a higher fence exists."""

    @abstractmethod
    def claim_position(self, position: int, entry: str) -> str:
        """Fill `position` (1, 2, 3...) of the journal durably unless it is filled; return its entry."""

    @abstractmethod
    def journal_entry(self, position: int) -> str | None:
        """Return the entry of the journal at `position`."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection to the store."""
