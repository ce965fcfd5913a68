"""The verbs that work: open, server, site."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from console.main import INTERRUPTED, STOPPED
from console.progress import Progress
from console.words import screen
from server_worker.worker import ServerWorker
from shared.message import SERVER
from shared.worker import Facts, StopSignal
from site_worker.worker import SiteWorker


def open_run(path: Path, overrides: Sequence[str]) -> int:
    """Open a run and say so."""

    def opened(worker: ServerWorker | SiteWorker) -> bool:
        assert isinstance(worker, ServerWorker)
        worker.open_run()
        return True

    def said(worker: ServerWorker | SiteWorker) -> str:
        run = worker.run_config.run
        return f"run {run.id} is open; {', '.join(run.sites)} may begin"

    return _watched(ServerWorker, path, overrides, opened, said)


def work_as_server(path: Path, overrides: Sequence[str], idle_seconds: float | None) -> int:
    """Work as the server; returns the exit code."""

    def said(worker: ServerWorker | SiteWorker) -> str:
        assert isinstance(worker, ServerWorker)
        return f"run {worker.run_config.run.id} is finished; report in {worker.report_folder}"

    return _watched(ServerWorker, path, overrides, lambda worker: worker.work(idle_seconds), said)


def work_as_site(path: Path, overrides: Sequence[str], idle_seconds: float | None) -> int:
    """Work as a site; returns the exit code."""

    def said(worker: ServerWorker | SiteWorker) -> str:
        assert isinstance(worker, SiteWorker)
        return f"run {worker.run_config.run.id} is finished; the site's part of the model is in {worker.model_folder}"

    return _watched(SiteWorker, path, overrides, lambda worker: worker.work(idle_seconds), said)


def _watched(
    kind: type[ServerWorker] | type[SiteWorker],
    path: Path,
    overrides: Sequence[str],
    work: Callable[[ServerWorker | SiteWorker], bool],
    said: Callable[[ServerWorker | SiteWorker], str],
) -> int:
    """Let a worker work in view of the user, who may stop it."""
    stop, console = StopSignal(), screen()
    warned: list[str] = []

    def observe(facts: Facts) -> None:
        if worker.recovered != warned:
            warned[:] = worker.recovered
            progress.warn([f"damaged checkpoint passed over: {line}" for line in warned])
        progress.observe(facts)

    worker = kind(path, overrides, stop=stop, observe=observe)
    stop.install()
    name = worker.config.name if isinstance(worker, SiteWorker) else SERVER
    with Progress(name, console) as progress:
        finished = work(worker)
    if stop.number is not None and not finished:
        print(STOPPED, file=sys.stderr)
        return INTERRUPTED if stop.number == signal.SIGINT else 0
    console.print(said(worker) if finished else "nothing more to do for now; start the same command again to go on", soft_wrap=True)
    return 0
