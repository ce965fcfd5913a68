"""Heartbeat of a worker: reports its status to the run store from a separate thread."""

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
    """Thread that reports a worker's status to the run store every `interval` seconds.

    An exception ends one beat and never the thread. The last report of a worker that fails is the number
    and title of its error, since the run store has other readers than the worker's own console.

    Args:
        open_store: opens the thread's own connection.
        status: returns the status; called on the thread.
        observe: receives the same status, e.g. to draw progress.
        beat: further work at each beat, with the store; its exception is kept in `error`.
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
                self._report(store)
            except Exception as error:
                # An unreachable store must not end the training; the worker checks `error`.
                self._set_error(error)
                self._stop.wait(self.interval)
            else:
                if self.error is not None:
                    event("store_reachable")
                self.error = None
        if store is not None:
            with suppress(Exception):  # the last report, which cannot be repeated
                self._report(store)
            with suppress(Exception):
                store.close()

    def _set_error(self, error: Exception) -> None:
        if self.error is None:
            reason = str(error) if isinstance(error, BrokerError) else type(error).__name__
            event("store_unreachable", WARNING, reason=reason)
        self.error = error
        with suppress(Exception):  # `status` itself may have failed
            self._show(self.status())

    def _report(self, store: RunStore) -> None:
        status = self.status()
        if self._failure is not None:
            status = replace(status, phase=Phase.FAILED, detail=self._failure)
        self._show(status)
        store.put_status(self.worker, status)

    def _show(self, status: WorkerStatus) -> None:
        with suppress(Exception):  # a failing observer must stop neither the work nor the report
            self.observe(status)
