"""A worker at the command line: its progress, its log, and signals that stop it."""

from collections.abc import Callable
from importlib.metadata import version
from logging import WARNING

from rich.console import Console

from nightsplit.console.exit_codes import stopped
from nightsplit.console.ui import json_log
from nightsplit.console.ui.progress import Progress
from nightsplit.console.ui.text import screen
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.log import event
from nightsplit.shared.run_store.status import WorkerStatus
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.site_worker.worker import SiteWorker

WITHOUT_KEYS = "this run has no keys: its messages are neither signed nor sealed, which is for one machine only"


class Watch:
    """Progress of a worker at the command line, or its log if `log_format` is "json"; and its stop signal."""

    def __init__(self, log_format: str = "text") -> None:
        json_log.switch(log_format == "json")
        self.stop = StopSignal()
        self._console = Console(quiet=True, force_terminal=False) if json_log.is_on() else screen()
        self._pulse = json_log.Pulse()
        self._worker: ServerWorker | SiteWorker
        self._progress: Progress
        self._warned: list[str] = []

    def observe(self, status: WorkerStatus) -> None:
        """Show the worker's status."""
        if self._worker.skipped_checkpoints != self._warned:
            self._warned = self._worker.skipped_checkpoints
            self._progress.warn([f"skipped a damaged checkpoint: {line}" for line in self._warned])
        self._progress.observe(status)
        self._pulse.observe(status)

    def run(self, name: str, worker: ServerWorker | SiteWorker, work: Callable[[], bool], end: str) -> int:
        """Run a worker until it finishes (then print `end`), leaves or is stopped, and return the exit code."""
        self._worker, self._progress = worker, Progress(name, self._console)
        json_log.name(name, worker.run_config.run.id)
        event("started", version=version("nightsplit"))
        self.stop.install()
        with self._progress:
            if worker.sealer is None:
                event("without_keys", WARNING)
                self._progress.warn([WITHOUT_KEYS])
            finished = work()
        self._pulse.log()
        if finished:
            self._console.print(end, soft_wrap=True)
        elif self.stop.requested:
            return stopped(self.stop)
        else:
            self._console.print("nothing more to do at present; start the same command again to continue")
        return 0
