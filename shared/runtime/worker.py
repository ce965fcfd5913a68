"""Base of the workers of sites and server: their run, shift and status."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from nightsplit.shared.address import DEFAULT_PORTS, read_address
from nightsplit.shared.clock import Clock, SystemClock
from nightsplit.shared.config.worker import WorkerSection
from nightsplit.shared.engine.counters import Counters
from nightsplit.shared.log import event
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.run_store.status import Phase, WorkerStatus, clean_detail
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.shared.runtime.shift import Shift
from nightsplit.shared.trust.sealer import make_sealer

if TYPE_CHECKING:
    from nightsplit.shared.runtime.metrics import Telemetry

Observer = Callable[[WorkerStatus], None]


class Participant:
    """Participant of a run, a site or the server: its run, folders, credentials and run store.

    Args:
        base: folder of the worker's file; relative paths start there.
        name: the participant's name in the run.
        config: the worker's section.
        overrides: "section.key=value" for run.toml (as in `nightsplit.shared.protocols.load.load_run`).

    Attributes:
        addresses: addresses of broker and store, unless they are files.
        sealer: makes and opens the envelopes of the run; None if it has no keys.

    Raises:
        ConfigError: 101-103 as `load_run`, 107 or 111 an address cannot be used; 113, 121 or 122 as `make_sealer`.
    """

    def __init__(self, base: Path, name: str, config: WorkerSection, overrides: Sequence[str]) -> None:
        self.base = base
        self.run_config = load_run(base / config.run, overrides)
        self.run_folder = (base / config.run).parent
        self.state_folder = base / config.state
        self.credentials = config.credentials(base)
        texts = (config.broker, config.store)
        self.addresses = [read_address(text) for text in texts if text.partition(":")[0] in DEFAULT_PORTS]
        identity = None if config.identity is None else base / config.identity
        self.sealer = make_sealer(self.run_config, name, identity, self.state_folder, config.broker)
        self._store_address = config.store

    def open_store(self) -> RunStore:
        """Open a new connection to the run store."""
        return open_store(self._store_address, self.run_config.run.id, self.base, self.credentials)


class Worker(Participant):
    """Worker of one run that works in its shifts.

    Args:
        base, name, config, overrides: see `Participant`.
        clock: clock of the shift.
        stop: signal that is checked between steps.
        observe: receives the worker's status every second.

    Attributes:
        phase: present state of the worker.
        skipped_checkpoints: name and damage of each checkpoint that was skipped.
    """

    def __init__(
        self, base: Path, name: str, config: WorkerSection, overrides: Sequence[str],
        clock: Clock | None, stop: StopSignal | None, observe: Observer,
    ) -> None:  # fmt: skip
        super().__init__(base, name, config, overrides)
        self.shift = Shift(config.shift)
        self.phase = Phase.STARTING
        self._detail: str | None = None
        self._reason: str | None = None
        self.skipped_checkpoints: list[str] = []
        self._metrics_address = config.metrics
        self._clock = clock or SystemClock()
        self._stop = stop or StopSignal()
        self._observer = observe
        self._counters = Counters()
        self._telemetry: Telemetry | None = None

    def enter(self, phase: Phase, detail: str | None = None, reason: str | None = None) -> None:
        """Change the phase or its reason. A change is logged.

        Args:
            detail: its reason, for all readers of the run store.
            reason: its reason for this machine's own console and log, in place of `detail`.
        """
        before = self.phase, self._detail, self._reason
        self.phase, self._detail, self._reason = phase, detail, reason
        if before != (phase, detail, reason):
            facts = {"detail": reason or detail} if reason or detail else {}
            event(phase, WARNING if phase is Phase.BLOCKED else INFO, **facts)

    def _present(self) -> WorkerStatus:
        """Return the status that every worker has; at work it may be blocked by the broker."""
        phase, detail = self.phase, self._detail
        if phase is Phase.WORKING and self._counters.blocked_reason is not None:
            phase, detail = Phase.BLOCKED, self._counters.blocked_reason
        return WorkerStatus(
            phase=phase,
            detail=None if detail is None else clean_detail(detail),
            run=self.run_config.run.id,
            digest=self.run_config.digest,
            skipped_checkpoints=tuple(map(clean_detail, self.skipped_checkpoints)),
        )

    @contextmanager
    def telemetry(self, worker: str, sites: Sequence[str]) -> Iterator[None]:
        """Serve metrics while the body runs, if the worker's file has an address; see `serve_metrics`."""
        if self._metrics_address is None:
            yield
            return
        from nightsplit.shared.runtime.metrics import Telemetry
        from nightsplit.shared.runtime.metrics_server import serve_metrics  # imported only with an address

        self._telemetry = Telemetry(self.run_config.run.id, worker, sites)
        with serve_metrics(self._telemetry, self._metrics_address, self.credentials):
            yield

    def _observe(self, status: WorkerStatus) -> None:
        if self._telemetry is not None:
            self._telemetry.observe(status, self._counters.counts)
        has_reason = self._reason is not None and status.phase is self.phase
        self._observer(replace(status, detail=self._reason) if has_reason else status)

    def wait_for_shift(self) -> bool:
        """Sleep until the shift is open; return False if the worker has to stop."""
        while not self.shift.is_open(self._clock.now()) and not self._stop.requested:
            self.enter(Phase.WAITING, f"its shift ({self.shift})")
            remaining = (self.shift.opens_at(self._clock.now()) - self._clock.now()).total_seconds()
            self._clock.sleep(min(remaining, 2.0))  # not longer, since a signal does not end a sleep
        return not self._stop.requested

    def off_duty(self) -> bool:
        """Return whether the worker has to stop, or its shift is over."""
        return self._stop.requested or not self.shift.is_open(self._clock.now())
