"""A run on this computer, with each worker in a process of its own, over the embedded broker.

    nights and days                                   killed
    night 1   the sites, no server                    all workers from the start
    day 1     the server alone                        a third of the way     kill -9 server, start it again
    night 2   the sites again                         two thirds of the way  kill -9 a site, start it again
    day 2     the server alone                        until the run ends
    then      all workers, until the run ends

In strict order both end with the same weights, bit for bit.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from nightsplit.console.ui.text import counted, server_offline
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.foreign import shown
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.status import UNREADABLE, WorkerStatus
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.shared.storage.checkpoint import Checkpoints
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.worker import SiteWorker

NIGHTS = 2
"""Nights and days, before all workers are online together."""
IDLE_SECONDS = 1.0
"""Idle time after which a worker leaves, by night and by day."""

ABSENT_SECONDS = 1.5
"""Absence of a killed worker, long enough for the others to notice it."""

Workers = dict[str, BaseProcess]
Observer = Callable[[Workers], None]


def warm_up() -> None:
    """Start the process that workers are forked from: it imports torch, which takes seconds, in the background."""
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    forkserver.ensure_running()


class LocalRun:
    """The run in folder `work`: starts, awaits and kills its workers, and prints the events."""

    def __init__(self, work: Path, console: Console) -> None:
        self._work, self._console = work, console
        self._server = ServerWorker(work / "server.toml")
        self._run = self._server.run_config.run
        self._names = spec_of(self._server.run_config).names

    def run_nights_and_days(self) -> bool:
        """Run the sites and the server in turns, then together to the end; return whether no worker failed."""
        noun, reply = self._names.message, self._names.reply
        self._server.open_run()
        with closing(self._server.open_store()) as store:
            for night in range(1, NIGHTS + 1):
                if not self._run_workers(self._run.sites, IDLE_SECONDS):
                    return False
                sent, applied, _ = self._counts(store)
                self._console.print(f"night {night}, 22:00  {server_offline(sent - applied, noun, self._names.fate)}")
                if not self._run_workers([SERVER], IDLE_SECONDS):
                    return False
                applied_before = applied
                sent, applied, answered = self._counts(store)
                done, queued = counted(applied - applied_before, noun), counted(applied - answered, reply)
                self._console.print(
                    f"day {night},   08:00  sites are offline; the server {self._names.done} {done}, {queued} queued, "
                    f"{counted(sent - applied, noun)} waiting for those of another site"
                )
            self._console.print(f"night {NIGHTS + 1}, 22:00  all workers are online until the run ends")
            return self._run_together(store)

    def run_with_kills(self, steps: int) -> int | None:
        """Run all workers to the end, and kill first the server and then a site in the middle of their work.

        Return the number of kills, or None if a worker failed by itself; the run has `steps` training steps.
        """
        self._server.open_run()
        with closing(self._server.open_store()) as store:
            due = [(steps // 3, SERVER), (2 * steps // 3, self._run.sites[0])]
            kills = 0

            def kill_if_due(workers: Workers) -> None:
                nonlocal kills
                if not due or self._step() < due[0][0]:
                    return
                _, victim = due.pop(0)
                if workers[victim].is_alive():
                    workers[victim].kill()
                    workers[victim].join()
                    time.sleep(ABSENT_SECONDS)
                    kills += 1
                    lost = counted(self._lost(victim, store), "step" if victim == SERVER else "answer")
                    event = f"kill -9 {victim} after step {self._step()}: its checkpoint lacked {lost}"
                    self._console.print(f"{event}; started again")
                    workers[victim] = start(_work, victim, self._work, None)

            succeeded = self._run_together(store, kill_if_due)
        return kills if succeeded else None

    def _run_together(self, store: RunStore, observe: Observer = lambda workers: None) -> bool:
        """Run all workers until the run ends; return whether no worker failed."""
        with Progress(console=self._console, transient=True, disable=not self._console.is_terminal) as progress:
            bar = progress.add_task("batches", total=None)

            def show_and_observe(workers: Workers) -> None:
                report = _report_of(store, SERVER)
                progress.update(bar, total=report.planned, completed=report.applied)
                observe(workers)

            return self._run_workers([SERVER, *self._run.sites], None, show_and_observe)

    def _run_workers(
        self, names: Sequence[str], idle_seconds: float | None, observe: Observer = lambda workers: None
    ) -> bool:
        """Start workers and wait until all have left, or one fails; return whether none failed."""
        workers = {name: start(_work, name, self._work, idle_seconds) for name in names}
        try:
            while any(worker.is_alive() for worker in workers.values()):
                if any(worker.exitcode for worker in workers.values()):
                    break
                observe(workers)
                time.sleep(0.1)
        finally:
            for worker in workers.values():
                worker.terminate()
                worker.join()
        return not any(worker.exitcode for worker in workers.values())

    def _counts(self, store: RunStore) -> tuple[int, int, int]:
        """Return the numbers of batches sent, of batches that the server has applied, and of answers that arrived."""
        sites = [_report_of(store, site) for site in self._run.sites]
        sent, answered = sum(site.sent or 0 for site in sites), sum(site.answered or 0 for site in sites)
        return sent, _report_of(store, SERVER).applied or 0, answered

    def _step(self) -> int:
        """Return the server's last training step in its metrics."""
        metrics = self._server.report_folder / "metrics.jsonl"
        complete = metrics.read_text(encoding="utf-8").rpartition("\n")[0] if metrics.exists() else ""
        return int(json.loads(complete.rpartition("\n")[2])["step"]) if complete else 0

    def _lost(self, victim: str, store: RunStore) -> int:
        """Return the steps of a killed server, or the answers to a killed site, that its newest checkpoint lacks."""
        worker = self._server if victim == SERVER else SiteWorker(self._work / f"{victim}.toml")
        found = Checkpoints(worker.state_folder / "checkpoints").load()
        role = found[1].facts["role"] if found else {"steps": 0, "answered": 0}
        if victim == SERVER:
            return self._step() - int(role["steps"])
        site = _report_of(store, SERVER).sites.get(victim)
        return (site.applied if site else 0) - int(role["answered"])


def start(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Run `work` in a new process, which prints the error if it fails."""
    process = multiprocessing.get_context("forkserver").Process(target=_try, args=(work, *arguments))
    process.start()
    return process


def _try(work: Callable[..., None], *arguments: object) -> None:
    try:
        work(*arguments)
    except NightsplitError as error:
        print(shown(str(error)), file=sys.stderr)
        sys.exit(1)


def _work(name: str, folder: Path, idle_seconds: float | None) -> None:
    """Work as `nightsplit server server.toml` or `nightsplit site <name>.toml`."""
    stop = StopSignal()
    stop.install()
    worker: type[ServerWorker | SiteWorker] = ServerWorker if name == SERVER else SiteWorker
    worker(folder / f"{name}.toml", stop=stop).work(idle_seconds)


def _report_of(store: RunStore, worker: str) -> WorkerStatus:
    """Return a worker's last report."""
    status = store.statuses([worker]).get(worker)
    return status.report if status else UNREADABLE
