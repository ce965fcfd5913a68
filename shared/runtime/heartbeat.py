"""Tells the run store how a worker is, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from logging import WARNING
from types import TracebackType
from typing import Any

from nightsplit.shared.errors import BrokerError, NightsplitError
from nightsplit.shared.log import event
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.wire.message import Scalar

Facts = Mapping[str, Scalar | None]


@dataclass
class Heartbeat:
    """Tells the run store, every `interval` seconds, how a worker is; on a thread of its own.

    Args:
        worker: name under which it speaks.
        open_store: makes the thread's own connection.
        facts: what to say, called on the thread.
        observe: shown the same facts, e.g. to draw progress.
        beat: what else to do at each beat, with the store; whatever it raises is kept in `error`.
    """

    worker: str
    open_store: Callable[[], RunStore]
    facts: Callable[[], dict[str, Any]]
    observe: Callable[[Facts], None] = lambda facts: None
    beat: Callable[[RunStore], None] = lambda store: None
    interval: float = 1.0
    error: Exception | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _failure: str | None = None

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._failure = str(error) if isinstance(error, NightsplitError) else type(error).__name__
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
            store.close()

    def _store_is_away(self, error: Exception) -> None:
        if self.error is None:
            event("store_away", WARNING, reason=str(error) if isinstance(error, BrokerError) else type(error).__name__)
        self.error = error
        with suppress(Exception):  # it may have been the facts that failed
            self.observe(self.facts())

    def _store_is_back(self) -> None:
        if self.error is not None:
            event("store_back")
        self.error = None

    def _say(self, store: RunStore) -> None:
        facts = self.facts()
        if self._failure is not None:
            facts["state"] = f"failed: {self._failure}"
        self.observe(facts)
        store.put_status(self.worker, facts)
