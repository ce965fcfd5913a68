"""Plays a run for real: its workers as separate processes of this computer, over the embedded broker.

    nights and days                                   killed
    night 1   the sites, no server                    everybody online from the start
    day 1     the server alone                        a third of the way     kill -9 server, start it again
    night 2   the sites again                         two thirds of the way  kill -9 a site, start it again
    day 2     the server alone                        until the run is over
    then      everybody, until the run is over

In strict order none of this shows in the result: both end with the same bits.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
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
"""Nights and days apart, before everybody is online together."""
IDLE_SECONDS = 1.0
"""By night and by day a worker leaves when nothing happened for so long."""

ABSENT_SECONDS = 1.5
"""How long a killed worker stays away: the others have time to meet its absence, and to say so."""

Workers = dict[str, BaseProcess]
Observer = Callable[[Workers], None]


@dataclass(frozen=True, slots=True)
class Kill:
    """A worker that was ended with SIGKILL, and was started again.

    Attributes:
        worker: site name, or "server".
        step: training steps that the server had made.
        lost: what died with it, since its newest checkpoint lacked it: the server's steps, or the answers
            that the server had given to a site.
    """

    worker: str
    step: int
    lost: int

    def __str__(self) -> str:
        noun = "step" if self.worker == SERVER else "answer"
        return f"kill -9 {self.worker} after step {self.step}: its checkpoint lacked {counted(self.lost, noun)}"


def warm_up() -> None:
    """Let a process that workers are forked from import torch, which takes seconds, while this one is busy."""
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    forkserver.ensure_running()


class Play:
    """Starts, awaits and kills the workers of the run in folder `work`, and tells what happens."""

    def __init__(self, work: Path, console: Console) -> None:
        self._work, self._console = work, console
        self._server = ServerWorker(work / "server.toml")
        self._run = self._server.run_config.run
        self._names = spec_of(self._server.run_config).names

    def nights_and_days(self) -> bool:
        """Play the whole run, apart and then together; whether no worker failed."""
        noun, reply = self._names.message, self._names.reply
        self._server.open_run()
        with closing(self._server.open_store()) as store:
            for night in range(1, NIGHTS + 1):
                if not self._let_work(self._run.sites, IDLE_SECONDS):
                    return False
                sent, applied, _ = self._counts(store)
                self._console.print(f"night {night}, 22:00  {server_offline(sent - applied, noun, self._names.fate)}")
                if not self._let_work([SERVER], IDLE_SECONDS):
                    return False
                before, (sent, applied, answered) = applied, self._counts(store)
                done, queued = counted(applied - before, noun), counted(applied - answered, reply)
                self._console.print(
                    f"day {night},   08:00  sites are offline; the server {self._names.done} {done}, {queued} queued, "
                    f"{counted(sent - applied, noun)} held until those of another site come"
                )
            self._console.print(f"night {NIGHTS + 1}, 22:00  everybody is online, until the run is over")
            return self._together(store)

    def killed(self, steps: int) -> list[Kill] | None:
        """Play the whole run together, while first the server and then a site is killed in the middle of its work.

        Returns who was killed, or None when a worker failed by itself; the run has `steps` training steps.
        """
        due = [(steps // 3, SERVER), (2 * steps // 3, self._run.sites[0])]
        kills: list[Kill] = []

        def strike(workers: Workers) -> None:
            if not due or self._step() < due[0][0]:
                return
            _, victim = due.pop(0)
            if workers[victim].is_alive():
                workers[victim].kill()
                workers[victim].join()
                time.sleep(ABSENT_SECONDS)
                kills.append(Kill(victim, self._step(), self._lost(victim, store)))
                self._console.print(f"{kills[-1]}; started again")
                workers[victim] = start(_work, victim, self._work, None)

        self._server.open_run()
        with closing(self._server.open_store()) as store:
            return kills if self._together(store, strike) else None

    def _together(self, store: RunStore, strike: Observer = lambda workers: None) -> bool:
        """Everybody until the run is over; whether no worker failed."""
        with Progress(console=self._console, transient=True, disable=not self._console.is_terminal) as progress:
            bar = progress.add_task("batches", total=None)

            def observe(workers: Workers) -> None:
                told = _told(store, SERVER)
                progress.update(bar, total=told.planned, completed=told.applied)
                strike(workers)

            return self._let_work([SERVER, *self._run.sites], None, observe)

    def _let_work(
        self, names: Sequence[str], idle_seconds: float | None, observe: Observer = lambda workers: None
    ) -> bool:
        """Start these workers and wait until all have left; when one fails, send the others home."""
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
        """Batches that sites have sent, that the server has applied, whose answers the sites have."""
        sites = [_told(store, site) for site in self._run.sites]
        sent, answered = sum(told.sent or 0 for told in sites), sum(told.answered or 0 for told in sites)
        return sent, _told(store, SERVER).applied or 0, answered

    def _step(self) -> int:
        """The training step that the server wrote down last, a moment ago."""
        metrics = self._server.report_folder / "metrics.jsonl"
        whole = metrics.read_text(encoding="utf-8").rpartition("\n")[0] if metrics.exists() else ""
        return int(json.loads(whole.rpartition("\n")[2])["step"]) if whole else 0

    def _lost(self, victim: str, store: RunStore) -> int:
        """What a killed worker had done, or was about to do, beyond its newest checkpoint."""
        worker = self._server if victim == SERVER else SiteWorker(self._work / f"{victim}.toml")
        found = Checkpoints(worker.state_folder / "checkpoints").load()
        role = found[1].facts["role"] if found else {"steps": 0, "answered": 0}
        if victim == SERVER:
            return self._step() - int(role["steps"])
        known = _told(store, SERVER).sites.get(victim)
        return (known.applied if known else 0) - int(role["answered"])


def start(work: Callable[..., None], *arguments: object) -> BaseProcess:
    """Do a worker's work in a process of its own, which says why it fails."""
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
    """What `nightsplit server server.toml` does, or `nightsplit site <name>.toml`."""
    stop = StopSignal()
    stop.install()
    worker: type[ServerWorker | SiteWorker] = ServerWorker if name == SERVER else SiteWorker
    worker(folder / f"{name}.toml", stop=stop).work(idle_seconds)


def _told(store: RunStore, worker: str) -> WorkerStatus:
    """What a worker last said of itself."""
    status = store.statuses([worker]).get(worker)
    return status.report if status else UNREADABLE
