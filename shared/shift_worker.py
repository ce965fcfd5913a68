"""What a site's worker and the server's have in common: a run, a shift, and when to leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shared.clock import Clock, SystemClock
from shared.config import RunConfig, WorkerSection, load
from shared.engine import Progress
from shared.shift import Shift
from shared.store import RunStore
from shared.stores import open_store
from shared.worker import Facts, StopSignal


class ShiftWorker:
    """A worker of one run that works in its shifts.

    Args:
        base: folder of the worker's file; relative paths start there.
        config: the worker's section.
        overrides: "section.key=value" for run.toml (as `shared.config.load`).
        clock: tells when the shift is.
        stop: asked between steps.
        observe: shown the worker's facts every second.

    Attributes:
        state: what the worker does, in words.
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
        self.shift = Shift(config.shift)
        self.state_folder = base / config.state
        self.state = "starting"
        self.recovered: list[str] = []
        self._store_address = config.store
        self._clock = clock or SystemClock()
        self._stop = stop or StopSignal()
        self._observe = observe
        self._progress = Progress()

    def open_store(self) -> RunStore:
        """A connection of its own to the run store."""
        return open_store(self._store_address, self.run_config.run.id, self.base)

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
