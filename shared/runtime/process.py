"""What the workers of both sides need around the engine: a folder of their own, threads, a voice."""

import ctypes
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from nightsplit.shared.errors import ConfigError, StateError
from nightsplit.shared.storage.files import make_private_folder

PREFETCH_BYTES = 128 * 2**20
"""What a worker may hold of one queue."""
INBOX_BYTES = 512 * 2**20
"""What it may hold of all its queues together, as far as `LEAST_PREFETCH` allows."""
LEAST_PREFETCH, MOST_PREFETCH = 16, 512
"""Fewer than 16 would mean a checkpoint per message or two, since the engine divides them by four."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep a state folder for this process alone; the lock ends with the process, however it ends.

    Raises:
        StateError: 503 another process has it, 501 it cannot be written, 513 it is open to other users.
    """
    with try_lock_folder(folder) as alone:
        if not alone:
            what = f"{folder} is used by another process."
            raise StateError(503, what, "stop the other worker, or give this one its own folder.")
        yield


@contextmanager
def try_lock_folder(folder: Path) -> Iterator[bool]:
    """Lock a state folder while the block runs, if nobody else has; whether it is locked.

    Raises:
        StateError: 501 it cannot be written, 513 it is open to other users.
    """
    try:
        make_private_folder(folder)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StateError(501, f"{folder}: {error.strerror}.", "name a state folder on a disk with room.") from None
    alone = False
    try:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        yield alone
    finally:
        os.close(handle)


def prepare_torch(threads: int, device: str) -> None:
    """Fix the number of threads and check the device; ConfigError 109 where it is not there."""
    torch.set_num_threads(threads)
    _keep_memory()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        what = f"device {device!r}: {reason}."
        raise ConfigError(109, what, 'use device = "cpu", or install a CUDA build of torch.') from None


def _keep_memory() -> None:
    """Let freed memory stay with the process, where the C library can do that (glibc).

    By default it gives the megabytes of every batch back, and gets them again as zeroed pages:
    a fifth of the worker's time was spent on that. The most that was ever needed is kept.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 2**30)


def prefetch_for(message_bytes: int, queues: int = 1) -> int:
    """Deliveries of each of its queues that a worker takes at a time: as many as fit its memory, within reason."""
    fitting = min(PREFETCH_BYTES, INBOX_BYTES // queues) // max(1, message_bytes)
    return max(LEAST_PREFETCH, min(MOST_PREFETCH, fitting))


@dataclass(slots=True)
class StopSignal:
    """SIGTERM and Ctrl-C ask a worker to leave after its current step; a second one ends it at once.

    Attributes:
        asked: whether one came.
        number: which one it was; None before one came.
    """

    asked: bool = False
    number: int | None = None

    def install(self) -> None:
        """Listen from now on. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked, self.number = True, number
