"""What a site's worker and the server's have in common: a run, a shift, and when to leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nightsplit.shared.clock import Clock, SystemClock
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.config.worker import WorkerSection
from nightsplit.shared.engine.counters import Counters
from nightsplit.shared.log import event, phase_of
from nightsplit.shared.protocols.load import load
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.runtime.heartbeat import Facts
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.shared.runtime.shift import Shift

if TYPE_CHECKING:
    from nightsplit.shared.runtime.metrics import Telemetry


class ShiftWorker:
    """A worker of one run that works in its shifts.

    Args:
        base: folder of the worker's file; relative paths start there.
        config: the worker's section.
        overrides: "section.key=value" for run.toml (as `nightsplit.shared.protocols.load.load`).
        clock: tells when the shift is.
        stop: asked between steps.
        observe: shown the worker's facts every second.

    Attributes:
        recovered: damaged checkpoints that were passed over.
    """

    def __init__(
        self,
        base: Path,
        config: WorkerSection,
        overrides: Sequence[str],
        clock: Clock | None,
        stop: StopSignal | None,
        observe: Callable[[Facts], None],
    ) -> None:
        self.base = base
        self.run_config = load(base / config.run, RunConfig, overrides)
        self.run_folder = (base / config.run).parent
        self.shift = Shift(config.shift)
        self.state_folder = base / config.state
        self._state = "starting"
        self.recovered: list[str] = []
        self.credentials = config.credentials(base)
        self._store_address = config.store
        self._metrics_address = config.metrics
        self._clock = clock or SystemClock()
        self._stop = stop or StopSignal()
        self._show = observe
        self._progress = Counters()
        self._telemetry: Telemetry | None = None

    @property
    def state(self) -> str:
        """What the worker does, in words. A change is an event of the log."""
        return self._state

    @state.setter
    def state(self, state: str) -> None:
        if state != self._state:
            self._state = state
            event(phase_of(state), state=state)

    @contextmanager
    def telemetry(self, worker: str, sites: Sequence[str]) -> Iterator[None]:
        """Answer Prometheus while the block runs, where the worker's file asks for it; see `served`."""
        if self._metrics_address is None:
            yield
            return
        from nightsplit.shared.runtime.metrics import Telemetry
        from nightsplit.shared.runtime.metrics_server import served  # loaded by those who want it

        self._telemetry = Telemetry(self.run_config.run.id, worker, sites)
        with served(self._telemetry, self._metrics_address, self.credentials):
            yield

    def _observe(self, facts: Facts) -> None:
        if self._telemetry is not None:
            self._telemetry.observe(facts, self._progress.counts)
        self._show(facts)

    def open_store(self) -> RunStore:
        """A connection of its own to the run store."""
        return open_store(self._store_address, self.run_config.run.id, self.base, self.credentials)

    def wait_for_shift(self) -> bool:
        """Sleep until the shift is open; False when asked to stop."""
        while not self.shift.is_open(self._clock.now()) and not self._stop.asked:
            self.wait_as(f"waiting for its shift ({self.shift})")
            left = (self.shift.opens_at(self._clock.now()) - self._clock.now()).total_seconds()
            self._clock.sleep(min(left, 2.0))  # not longer, since a signal does not end a sleep
        return not self._stop.asked

    def wait_as(self, state: str) -> None:
        """Say what is waited for."""
        self.state = state

    def off_duty(self) -> bool:
        """Whether the worker was asked to stop, or its shift is over."""
        return self._stop.asked or not self.shift.is_open(self._clock.now())
