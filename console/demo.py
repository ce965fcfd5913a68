"""The demo: an example played for real, by separate processes over the embedded broker.

    night 1     three sites, no server     publish what the window allows, and go
    day 1       the server alone           works off what is its turn, and goes
    night 2     the sites again            learn from the gradients that waited, publish more
    day 2       the server alone
    then        everybody online           until the run is over

In strict order none of this shows in the result: one uninterrupted night would have given the same.
"""

from __future__ import annotations

import json as json_text
import multiprocessing
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from console.baselines import alone, centralized
from console.words import columns, counted, screen, server_offline
from server_worker.worker import ServerWorker
from shared.config import RunConfig, load
from shared.errors import ConfigError, NightsplitError
from shared.message import SERVER
from shared.metrics import Metrics
from shared.store import RunStore
from shared.stores import open_store
from shared.worker import StopSignal, prepare_torch
from site_worker.data.dataset import Parts
from site_worker.worker import SiteWorker

EXAMPLES = Path(__file__).parent.parent / "examples"
NIGHTS = 2
"""Nights and days apart, before everybody is online together."""
IDLE_SECONDS = 1.0
"""By night and by day a worker leaves when nothing happened for so long."""
FIGURES: Mapping[str, tuple[str, str]] = {
    "binary": ("auc", "balanced_accuracy"),
    "multiclass": ("auc", "balanced_accuracy"),
    "regression": ("r2", "mae"),
}
"""What the table shows, by kind of task."""

Results = Mapping[str, Mapping[str, Metrics]]
"""Test figures by model, and by the patients of a site or "all"."""


def run_demo(folder: Path | None, json: bool) -> int:
    """Play an example and show what came of it.

    Args:
        folder: the example's folder; None for examples/cholesterol.
        json: print one JSON object with flat keys, and nothing else.

    Returns:
        The exit code: 1 when a worker failed, which said why.

    Raises:
        ConfigError: 110 no such example; others as the workers'.
        DataError: the example's data is missing; the error says where to get it.
    """
    began = time.monotonic()
    # Importing torch takes seconds: once for all workers, and while this process is busy, too.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    forkserver.ensure_running()
    console = screen()
    console.quiet = json
    example = _example(folder)
    work = _working_copy(example)
    config = load(work / "run.toml", RunConfig)
    parts = {site: SiteWorker(work / f"{site}.toml").load_parts() for site in config.run.sites}
    sizes = ", ".join(f"{site} {len(part.train)}" for site, part in parts.items())
    console.print(f"{example.name}: {config.run.protocol}, window {config.run.window}")
    console.print(f"training samples: {sizes}")
    console.print(f"files: {work}\n")
    prepare_torch(1, "cpu")
    if not _Play(work, config, console).until_the_end():
        return 1
    report = json_text.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
    results = _results(config, parts, report["best"])
    seconds = round(time.monotonic() - began, 1)
    if json:
        print(json_text.dumps({**_flat(config, results, report), "seconds": seconds}))
        return 0
    console.print(f"\nTest patients, {' / '.join(FIGURES[config.task.kind])}; all: mean by samples")
    console.print(_table(config, results))
    console.print(f"\nsha256 of the server's half: {report['top_sha256']}")
    if config.run.order == "strict":
        console.print("The order is strict: played again on this machine, it comes out the same to the bit.")
    console.print(f"report: {work / 'report' / 'report.md'} ({seconds:.0f} s in all)")
    return 0


def _example(folder: Path | None) -> Path:
    name = folder or Path("cholesterol")
    for place in (name, EXAMPLES / name, EXAMPLES / name.name):
        if (place / "run.toml").is_file():
            return place.resolve()
    known = ", ".join(sorted(path.parent.name for path in EXAMPLES.glob("*/run.toml")))
    remedy = f"name one of examples/: {known}." if known else "get the repository, which has examples/."
    raise ConfigError(110, f"{name} is no folder with a run.toml.", remedy)


def _working_copy(example: Path) -> Path:
    """A fresh folder with the example's files, and with the data that it brings itself."""
    stamp = time.strftime("demo-%Y%m%d-%H%M%S-")
    home = Path("runs")
    try:
        home.mkdir(exist_ok=True)
        work = home / Path(tempfile.mkdtemp(prefix=stamp, dir=home)).name
    except OSError:  # not a folder that we may write to
        work = Path(tempfile.mkdtemp(prefix=stamp))
    for file in example.iterdir():
        if file.suffix in (".toml", ".py"):
            shutil.copy(file, work)
    if (work / "prepare.py").exists():
        runpy.run_path(str(work / "prepare.py"), run_name="__main__")
    return work


class _Play:
    """Starts and awaits the workers of one run.

    Args:
        work: folder with the run's files.
        config: the run.
        console: told what happens.
    """

    def __init__(self, work: Path, config: RunConfig, console: Console) -> None:
        self._work, self._run, self._console = work, config.run, console

    def until_the_end(self) -> bool:
        """Play the whole run; whether no worker failed."""
        server = ServerWorker(self._work / "server.toml")
        server.open_run()
        with closing(open_store(server.config.store, self._run.id, self._work)) as store:
            for night in range(1, NIGHTS + 1):
                if not self._let_work(self._run.sites, IDLE_SECONDS):
                    return False
                sent, applied, _ = self._counts(store)
                self._console.print(f"night {night}, 22:00  {server_offline(sent - applied)}")
                if not self._let_work([SERVER], IDLE_SECONDS):
                    return False
                before, (sent, applied, answered) = applied, self._counts(store)
                self._console.print(
                    f"day {night},   08:00  sites are offline; the server trained on "
                    f"{counted(applied - before, 'batch')}, {counted(applied - answered, 'answer')} queued, "
                    f"{counted(sent - applied, 'batch')} held until those of another site come"
                )
            self._console.print(f"night {NIGHTS + 1}, 22:00  everybody is online, until the run is over")
            with Progress(console=self._console, transient=True, disable=not self._console.is_terminal) as progress:
                bar = progress.add_task("batches", total=None)

                def observe() -> None:
                    facts = _facts(store, SERVER)
                    progress.update(bar, total=facts.get("planned"), completed=facts.get("applied"))

                return self._let_work([SERVER, *self._run.sites], None, observe)

    def _let_work(
        self, names: Sequence[str], idle_seconds: float | None, observe: Callable[[], None] = lambda: None
    ) -> bool:
        """Start these workers and wait until all have left; when one fails, send the others home."""
        context = multiprocessing.get_context("forkserver")
        processes = [context.Process(target=_worker, args=(n, self._work, idle_seconds)) for n in names]
        for process in processes:
            process.start()
        try:
            while any(process.is_alive() for process in processes):
                if any(process.exitcode for process in processes):
                    break
                observe()
                time.sleep(0.1)
        finally:
            for process in processes:
                process.terminate()
                process.join()
        return not any(process.exitcode for process in processes)

    def _counts(self, store: RunStore) -> tuple[int, int, int]:
        """Batches that sites have sent, that the server has applied, whose answers the sites have."""
        facts = [_facts(store, site) for site in self._run.sites]
        sent, answered = (sum(said.get(name, 0) for said in facts) for name in ("sent", "answered"))
        return sent, _facts(store, SERVER).get("applied", 0), answered


def _worker(name: str, work: Path, idle_seconds: float | None) -> None:
    """What a worker's process runs: `nightsplit server server.toml`, or `nightsplit site <name>.toml`."""
    stop = StopSignal()
    stop.install()
    try:
        if name == SERVER:
            ServerWorker(work / "server.toml", stop=stop).work(idle_seconds)
        else:
            SiteWorker(work / f"{name}.toml", stop=stop).work(idle_seconds)
    except NightsplitError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _facts(store: RunStore, worker: str) -> Mapping[str, Any]:
    """What a worker last said of itself."""
    status = store.statuses().get(worker)
    return status.facts if status else {}


def _results(config: RunConfig, parts: Mapping[str, Parts], best: Mapping[str, Any]) -> Results:
    """Test figures of the split run, as its report has them, and of the baselines."""
    of_sites = {site: metrics["test"] for site, metrics in best["sites"].items()}
    results = {"split": {**of_sites, "all": best["overall"]["test"]}}
    baselines = {"centralized": centralized(config, parts)}
    baselines |= {f"{site} alone": alone(config, site, parts) for site in parts}
    return results | {name: {**b.sites, "all": b.overall} for name, b in baselines.items()}


def _table(config: RunConfig, results: Results) -> Table:
    figures, groups = FIGURES[config.task.kind], [*config.run.sites, "all"]
    table = columns("trained", *groups, numbers=groups)
    for name, metrics in results.items():
        cells = (" / ".join(_cell(metrics[group][figure]) for figure in figures) for group in groups)
        table.add_row(name, *cells)
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _flat(config: RunConfig, results: Results, report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything under keys such as split_north_r2 and north_alone_all_mae."""
    figures = {
        f"{name.replace(' ', '_')}_{group}_{figure}": metrics[figure]
        for name, groups in results.items()
        for group, metrics in groups.items()
        for figure in FIGURES[config.task.kind]
    }
    return {
        "run": report["run"],
        "best_epoch": report["best_epoch"],
        "sha256": report["top_sha256"],
        **figures,
    }
