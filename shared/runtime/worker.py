"""What a site's worker and the server's have in common: a run, a shift, and when to leave."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from nightsplit.shared.clock import Clock, SystemClock
from nightsplit.shared.config.worker import WorkerSection
from nightsplit.shared.engine.counters import Counters
from nightsplit.shared.log import event
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.run_store.status import Phase, WorkerStatus, brief
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.shared.runtime.shift import Shift

if TYPE_CHECKING:
    from nightsplit.shared.runtime.metrics import Telemetry

Observer = Callable[[WorkerStatus], None]


class Participant:
    """Participant of a run, a site or the server: its run, folders, credentials and run store.

    Args:
        base: folder of the worker's file; relative paths start there.
        config: the worker's section.
        overrides: "section.key=value" for run.toml (as `nightsplit.shared.protocols.load.load_run`).
    """

    def __init__(self, base: Path, config: WorkerSection, overrides: Sequence[str]) -> None:
        self.base = base
        self.run_config = load_run(base / config.run, overrides)
        self.run_folder = (base / config.run).parent
        self.state_folder = base / config.state
        self.credentials = config.credentials(base)
        self._store_address = config.store

    def open_store(self) -> RunStore:
        """Open a new connection to the run store."""
        return open_store(self._store_address, self.run_config.run.id, self.base, self.credentials)


class Worker(Participant):
    """A worker of one run that works in its shifts.

    Args:
        base, config, overrides: see `Participant`.
        clock: tells when the shift is.
        stop: asked between steps.
        observe: shown the worker's status every second.

    Attributes:
        phase: what the worker does.
        recovered: damaged checkpoints that were passed over.
    """

    def __init__(
        self,
        base: Path,
        config: WorkerSection,
        overrides: Sequence[str],
        clock: Clock | None,
        stop: StopSignal | None,
        observe: Observer,
    ) -> None:
        super().__init__(base, config, overrides)
        self.shift = Shift(config.shift)
        self.phase = Phase.STARTING
        self._detail: str | None = None
        self._reason: str | None = None
        self.recovered: list[str] = []
        self._metrics_address = config.metrics
        self._clock = clock or SystemClock()
        self._stop = stop or StopSignal()
        self._show = observe
        self._counters = Counters()
        self._telemetry: Telemetry | None = None

    def enter(self, phase: Phase, detail: str | None = None, reason: str | None = None) -> None:
        """Do something else from now on, or for another reason. A change is an event of the log.

        Args:
            phase: what.
            detail: why, in words that all may read in the run store.
            reason: why, for this machine's own console and log, in place of `detail`.
        """
        before = self.phase, self._detail, self._reason
        self.phase, self._detail, self._reason = phase, detail, reason
        if before != (phase, detail, reason):
            facts = {"detail": reason or detail} if reason or detail else {}
            event(phase, WARNING if phase is Phase.BLOCKED else INFO, **facts)

    def _present(self) -> WorkerStatus:
        """What every worker can tell; one at work may be held up by the broker."""
        phase, detail = self.phase, self._detail
        if phase is Phase.WORKING and self._counters.trouble is not None:
            phase, detail = Phase.BLOCKED, self._counters.trouble
        return WorkerStatus(
            phase=phase,
            detail=None if detail is None else brief(detail),
            run=self.run_config.run.id,
            digest=self.run_config.digest,
            skipped_checkpoints=tuple(map(brief, self.recovered)),
        )

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

    def _observe(self, status: WorkerStatus) -> None:
        if self._telemetry is not None:
            self._telemetry.observe(status, self._counters.counts)
        in_full = self._reason is not None and status.phase is self.phase
        self._show(replace(status, detail=self._reason) if in_full else status)

    def wait_for_shift(self) -> bool:
        """Sleep until the shift is open; False when asked to stop."""
        while not self.shift.is_open(self._clock.now()) and not self._stop.asked:
            self.enter(Phase.WAITING, f"its shift ({self.shift})")
            left = (self.shift.opens_at(self._clock.now()) - self._clock.now()).total_seconds()
            self._clock.sleep(min(left, 2.0))  # not longer, since a signal does not end a sleep
        return not self._stop.asked

    def off_duty(self) -> bool:
        """Whether the worker was asked to stop, or its shift is over."""
        return self._stop.asked or not self.shift.is_open(self._clock.now())
