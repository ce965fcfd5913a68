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
import os
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from multiprocessing import forkserver
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from console.baselines import alone, centralized
from server_worker.worker import ServerWorker
from shared.config import RunConfig, load
from shared.errors import ConfigError, NightsplitError
from shared.message import SERVER
from shared.metrics import Metrics
from shared.store import RunStore
from shared.stores import open_store
from shared.worker import Facts, StopSignal, prepare_torch
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
    console = Console(quiet=json, highlight=False)
    example = _example(folder)
    work = _working_copy(example)
    config = load(work / "run.toml", RunConfig)
    parts = {site: SiteWorker(work / f"{site}.toml").load_parts() for site in config.run.sites}
    console.print(f"[bold]{example.name}[/bold]: {', '.join(f'{s} {len(p.train)}' for s, p in parts.items())} "
                  f"training samples; {config.run.protocol}, window {config.run.window}. Files in {escape(str(work))}")  # fmt: skip
    prepare_torch(1, "cpu")
    if not _Play(work, config, console).until_the_end():
        return 1
    report = json_text.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
    results = _results(config, parts, report["best"])
    seconds = time.monotonic() - began
    if json:
        print(json_text.dumps(_flat(config, results, report) | {"seconds": round(seconds, 1)}))
        return 0
    console.print(_table(config, results))
    console.print(f"sha256 of the server's half: {report['top_sha256']}")
    if config.run.order == "strict":
        console.print("The order is strict: play it again on this machine and the sha256 is the same.")
    console.print(f"Report: {escape(str(work / 'report' / 'report.md'))}   ({seconds:.0f} s)")
    return 0


def _example(folder: Path | None) -> Path:
    name = folder or Path("cholesterol")
    for place in (name, EXAMPLES / name, EXAMPLES / name.name):
        if (place / "run.toml").is_file():
            return place.resolve()
    known = sorted(path.parent.name for path in EXAMPLES.glob("*/run.toml"))
    raise ConfigError(
        110,
        f"{name} is no folder with a run.toml.",
        f"name one of examples/: {', '.join(known)}." if known else "get the repository; its examples/ are not installed.",
    )


def _working_copy(example: Path) -> Path:
    """A fresh folder with the example's files, and with the data that it brings itself."""
    home = Path.cwd() / "runs"
    try:
        home.mkdir(exist_ok=True)
        writable = os.access(home, os.W_OK)
    except OSError:
        writable = False
    stamp = time.strftime("demo-%Y%m%d-%H%M%S-")
    work = Path(tempfile.mkdtemp(prefix=stamp, dir=home if writable else None))
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
        self._work, self._sites, self._console = work, config.run.sites, console
        self._server = ServerWorker(work / "server.toml")
        self._store = lambda: open_store(self._server.config.store, config.run.id, work)

    def until_the_end(self) -> bool:
        """Play the whole run; whether no worker failed."""
        self._server.open_run()
        with closing(self._store()) as store:
            for night in range(1, NIGHTS + 1):
                if not self._let_work(self._sites, IDLE_SECONDS):
                    return False
                sent, applied, answered = _counts(store, self._sites)
                self._say(f"night {night}  22:00  server is offline; {sent - applied} batches queued")
                before = applied
                if not self._let_work([SERVER], IDLE_SECONDS):
                    return False
                sent, applied, answered = _counts(store, self._sites)
                later = f"; {sent - applied} wait for their turn" if sent > applied else ""
                self._say(f"day {night}    08:00  sites are offline; the server trains on {applied - before} "
                          f"batches, {applied - answered} gradients queued{later}")  # fmt: skip
            self._say("then            everybody is online, until the run is over")
            with Progress(console=self._console, transient=True) as progress:
                bar = progress.add_task("batches", total=None)

                def observe() -> None:
                    facts = _facts(store, SERVER)
                    progress.update(bar, total=facts.get("planned"), completed=facts.get("applied"))

                return self._let_work([SERVER, *self._sites], None, observe)

    def _say(self, line: str) -> None:
        self._console.print(line)

    def _let_work(
        self, names: Sequence[str], idle_seconds: float | None, observe: Callable[[], None] = lambda: None
    ) -> bool:
        """Start these workers and wait until all have left; when one fails, send the others home."""
        context = multiprocessing.get_context("forkserver")
        processes = [context.Process(target=_worker, args=(n, self._work, idle_seconds), name=n) for n in names]
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


def _facts(store: RunStore, worker: str) -> Facts:
    status = store.statuses().get(worker)
    return status.facts if status else {}


def _counts(store: RunStore, sites: Sequence[str]) -> tuple[int, int, int]:
    """Batches that sites have sent, that the server has applied, and whose answers have reached the sites."""
    facts = [_facts(store, site) for site in sites]
    sent, answered = (sum(int(f.get(name) or 0) for f in facts) for name in ("sent", "answered"))
    return sent, int(_facts(store, SERVER).get("applied") or 0), answered


def _results(config: RunConfig, parts: Mapping[str, Parts], best: Mapping[str, Mapping[str, Metrics]]) -> Results:
    """Test figures of the split run, as its report has them, and of the baselines."""
    results = {"split": {site: m["test"] for site, m in best["sites"].items()} | {"all": best["overall"]["test"]}}
    baselines = {"centralized": centralized(config, parts)}
    baselines |= {f"{site} alone": alone(config, site, parts) for site in parts}
    return results | {name: {**b.sites, "all": b.overall} for name, b in baselines.items()}


def _table(config: RunConfig, results: Results) -> Table:
    figures = FIGURES[config.task.kind]
    title = f"Test patients, {' / '.join(figures)} (all: mean by samples)"
    table = Table(title=title, title_justify="left")
    table.add_column("trained")
    for group in [*config.run.sites, "all"]:
        table.add_column(group, justify="right")
    for name, groups in results.items():
        cells = [
            " / ".join("-" if (value := groups[group][f]) is None else f"{value:.3f}" for f in figures)
            for group in [*config.run.sites, "all"]
        ]
        table.add_row(name, *cells, style="bold" if name == "split" else None)
    return table


def _flat(config: RunConfig, results: Results, report: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {"run": report["run"], "best_epoch": report["best_epoch"], "sha256": report["top_sha256"]}
    for name, groups in results.items():
        for group, metrics in groups.items():
            for figure in FIGURES[config.task.kind]:
                flat[f"{name.replace(' ', '_')}_{group}_{figure}"] = metrics[figure]
    return flat
