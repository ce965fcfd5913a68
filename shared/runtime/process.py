"""Process of a worker: lock of its state folder, torch, memory and signals."""

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
"""Memory for the unacknowledged messages of one queue."""
INBOX_BYTES = 512 * 2**20
"""Memory for those of all queues together, as far as `PREFETCH_MIN` allows."""
PREFETCH_MIN, PREFETCH_MAX = 16, 512
"""Fewer than 16 would mean a checkpoint every few messages, since the engine divides them by four."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a state folder for this process alone; the lock ends with the process, even if it is killed.

    Raises:
        StateError: 503 another process has it, 501 it cannot be written, 513 it is open to other users.
    """
    with try_lock_folder(folder) as is_locked:
        if not is_locked:
            sentence = f"{folder} is used by another process."
            raise StateError(503, sentence, "stop the other worker, or give this one its own folder.")
        yield


@contextmanager
def try_lock_folder(folder: Path) -> Iterator[bool]:
    """Lock a state folder for the body unless another process has; yield whether it is locked. StateError 501, 513."""
    try:
        make_private_folder(folder)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        remedy = "name a state folder on a disk with free space."
        raise StateError(501, f"{folder}: {error.strerror}.", remedy) from None
    is_locked = False
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        yield is_locked
    finally:
        os.close(descriptor)


def prepare_torch(threads: int, device: str) -> None:
    """Set the number of threads and check the device; ConfigError 109 if it is not available."""
    torch.set_num_threads(threads)
    _keep_memory()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sentence = f"device {device!r}: {str(error).splitlines()[0]}."
        raise ConfigError(109, sentence, 'use device = "cpu", or install a CUDA build of torch.') from None


def _keep_memory() -> None:
    """Keep freed memory in the process, if the C library supports it (glibc).

    By default it returns the megabytes of every batch to the system and gets them again as zeroed
    pages, which took a fifth of the worker's time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    mallopt(_M_TRIM_THRESHOLD, 2**30)


def prefetch_for(message_bytes: int, queues: int = 1) -> int:
    """Return a worker's prefetch for each of its queues: deliveries that fit its memory, within limits."""
    fitting = min(PREFETCH_BYTES, INBOX_BYTES // queues) // max(1, message_bytes)
    return max(PREFETCH_MIN, min(PREFETCH_MAX, fitting))


@dataclass(slots=True)
class StopSignal:
    """Handler of SIGTERM and Ctrl-C: the first ends a worker after its current step, a second one at once."""

    requested: bool = False
    number: int | None = None

    def install(self) -> None:
        """Install the handlers. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested, self.number = True, number
