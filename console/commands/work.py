"""The verbs that work: open, server, site."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from nightsplit.console.exit_codes import stopped
from nightsplit.console.ui import json_log
from nightsplit.console.ui.progress import Progress
from nightsplit.console.ui.text import screen
from nightsplit.server_worker.stream.ddp import is_helper
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.log import event
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.worker import SiteWorker


def open_run(path: Path, overrides: Sequence[str]) -> int:
    """Open a run; returns the exit code."""
    watch = _Watch()

    def observe(status: WorkerStatus) -> None:
        if status.phase is Phase.STANDBY:  # all else is over in a moment
            watch.observe(status)

    server = ServerWorker(path, overrides, stop=watch.stop, observe=observe)
    run = server.run_config.run

    def opened() -> bool:
        server.open_run()
        return not watch.stop.requested

    return watch.over(SERVER, server, opened, f"run {run.id} is open; {', '.join(run.sites)} may begin")


def work_as_server(path: Path, overrides: Sequence[str], idle_seconds: float | None) -> int:
    """Work as the server; returns the exit code."""
    watch = _Watch()
    server = ServerWorker(path, overrides, stop=watch.stop, observe=watch.observe)
    if is_helper():
        watch.stop.install()  # nothing asks it: a helper leaves with its server
        server.help()
        return 0
    end = f"run {server.run_config.run.id} is finished; report in {server.report_folder}"
    return watch.over(SERVER, server, lambda: server.work(idle_seconds), end)


def work_as_site(path: Path, overrides: Sequence[str], idle_seconds: float | None) -> int:
    """Work as a site; returns the exit code."""
    watch = _Watch()
    site = SiteWorker(path, overrides, stop=watch.stop, observe=watch.observe)
    end = f"run {site.run_config.run.id} is finished; the site's part of the model is in {site.model_folder}"
    return watch.over(site.config.name, site, lambda: site.work(idle_seconds), end)


class _Watch:
    """The user's view of a worker, and the user's way to stop it."""

    def __init__(self) -> None:
        self.stop = StopSignal()
        self._console = Console(quiet=True, force_terminal=False) if json_log.is_on() else screen()
        self._pulse = json_log.Pulse()
        self._worker: ServerWorker | SiteWorker
        self._progress: Progress
        self._warned: list[str] = []

    def observe(self, status: WorkerStatus) -> None:
        """Show what the worker reports."""
        if self._worker.skipped_checkpoints != self._warned:
            self._warned = self._worker.skipped_checkpoints
            self._progress.warn([f"skipped a damaged checkpoint: {line}" for line in self._warned])
        self._progress.observe(status)
        self._pulse.observe(status)

    def over(self, name: str, worker: ServerWorker | SiteWorker, work: Callable[[], bool], end: str) -> int:
        """Let a worker work until it has finished, leaves, or is stopped; returns the exit code."""
        self._worker, self._progress = worker, Progress(name, self._console)
        json_log.name(name, worker.run_config.run.id)
        event("started", version=version("nightsplit"))
        self.stop.install()
        with self._progress:
            finished = work()
        self._pulse.tell()
        if finished:
            self._console.print(end, soft_wrap=True)
        elif self.stop.requested:
            return stopped(self.stop)
        else:
            self._console.print("nothing more to do for now; start the same command again to go on")
        return 0
