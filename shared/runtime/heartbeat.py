"""Tells the run store how a worker is, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from logging import WARNING

from msgspec.structs import replace

from nightsplit.shared.errors import BrokerError, NightsplitError
from nightsplit.shared.log import event
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.status import Phase, WorkerStatus


@dataclass
class Heartbeat:
    """Tells the run store, every `interval` seconds, how a worker is; on a thread of its own.

    An exception ends one beat and never the thread. The last words of a worker that fails are number and
    title of its error: the run store has other readers than the worker's own console.

    Args:
        worker: name under which it speaks.
        open_store: makes the thread's own connection.
        status: what to say, called on the thread.
        observe: shown the same, e.g. to draw progress.
        beat: what else to do at each beat, with the store; whatever it raises is kept in `error`.
    """

    worker: str
    open_store: Callable[[], RunStore]
    status: Callable[[], WorkerStatus]
    observe: Callable[[WorkerStatus], None] = lambda status: None
    beat: Callable[[RunStore], None] = lambda store: None
    interval: float = 1.0
    error: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _failure: str | None = None

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._failure = error.heading if isinstance(error, NightsplitError) else type(error).__name__
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        store: RunStore | None = None
        while not self._stop.wait(self.interval if store else 0.0):
            try:
                store = store or self.open_store()
                self.beat(store)
                self._say(store)
            except Exception as error:
                # A store that is away must not end the training; the worker looks at `error`.
                self._store_is_away(error)
                self._stop.wait(self.interval)
            else:
                self._store_is_back()
        if store is not None:
            with suppress(Exception):  # the last words; nobody is left who could say them again
                self._say(store)
            with suppress(Exception):
                store.close()

    def _store_is_away(self, error: Exception) -> None:
        if self.error is None:
            event(
                "store_unreachable",
                WARNING,
                reason=str(error) if isinstance(error, BrokerError) else type(error).__name__,
            )
        self.error = error
        with suppress(Exception):  # it may have been the status that failed
            self._show(self.status())

    def _store_is_back(self) -> None:
        if self.error is not None:
            event("store_reachable")
        self.error = None

    def _say(self, store: RunStore) -> None:
        status = self.status()
        if self._failure is not None:
            status = replace(status, phase=Phase.FAILED, detail=self._failure)
        self._show(status)
        store.put_status(self.worker, status)

    def _show(self, status: WorkerStatus) -> None:
        with suppress(Exception):  # showing it disturbs neither the work nor what others are told
            self.observe(status)
