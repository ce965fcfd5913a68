"""Cost of trust: CPU time of whole runs with and without envelopes and exit log, and of their parts for one message.

    python -m benchmarks.speed.trust --rounds 5
    python -m benchmarks.speed.trust --examples lung_ct cholesterol wide

Each round plays the same run twice, in turns: bare (no keys, no exit log; the gate is always there), and as a hospital
runs it. Workers are forked processes over the embedded broker, all online. "wide" is bound by transport: activations of
1 MiB behind one thin layer, and little to learn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from benchmarks.speed.common import scratch
from nightsplit.console.demo.demo import EXAMPLES, _copy_example
from nightsplit.console.demo.keys import give_keys, give_seeds
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.trust.envelope import Sealer
from nightsplit.shared.trust.identity import Identity
from nightsplit.shared.trust.run_keys import RunKeys
from nightsplit.shared.wire.message import SERVER, Header, Kind
from nightsplit.shared.wire.schema import BATCH, Payload, Reveals, TensorSpec
from nightsplit.site_worker.trust.approval import approve
from nightsplit.site_worker.trust.exit_log import ExitLog
from nightsplit.site_worker.worker import SiteWorker

FORKS = multiprocessing.get_context("fork")
WIDE = """
[run]
id = "wide"
protocol = "split_labels"
sites = ["north", "south"]
order = "strict"
epochs = 12
window = 8
batch_size = 32
[model]
factory = "nightsplit.models:mlp"
settings = { inputs = 4, hidden = [16384], outputs = 1 }
cut = 1
[task]
kind = "binary"
[data]
features = ["a", "b", "c", "d"]
"""
WORKER = '[{kind}]\n{name}broker = "embedded:broker"\nstore = "sqlite:run.sqlite"\nstate = "state/{worker}"\n'
DATA = '[data]\nsource = "table"\npath = "{site}.csv"\nlabel = "y"\n'
POLICY = 'allowed = ["labels", "activations", "stored_activations", "gradients", "weights", "counts"]\n'


class NoLog(ExitLog):
    """Exit log that writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path("nowhere"), "", Path("nowhere"))

    @override
    def open(self) -> None:
        """Open nothing."""

    @override
    def write(self, *facts: Any) -> None:
        """Write nothing."""

    @override
    def witness(self, signed: Any) -> None:
        """Write nothing."""


def wide(folder: Path) -> Path:
    """Write the run that is bound by transport."""
    work = folder / f"wide-{secrets.token_hex(4)}"
    work.mkdir()
    (work / "run.toml").write_text(WIDE)
    (work / "policy.toml").write_text(POLICY)
    (work / "server.toml").write_text(WORKER.format(kind="server", name="", worker="server"))
    draws = np.random.default_rng(3)
    for site in ("north", "south"):
        text = WORKER.format(kind="site", name=f'name = "{site}"\n', worker=site)
        (work / f"{site}.toml").write_text(text + DATA.format(site=site))
        rows = draws.normal(size=(400, 4))
        lines = [f"{','.join(f'{value:.4f}' for value in row)},{int(row[0] > 0)}" for row in rows]
        (work / f"{site}.csv").write_text("\n".join(["a,b,c,d,y", *lines]))
    return work


def prepared(example: str, folder: Path, trust: bool) -> Path:
    """Copy an example's files, with the same seeds of the sites in both variants."""
    work = wide(folder) if example == "wide" else _copy_example(EXAMPLES / example, "trust").absolute()
    give_seeds(work)
    if trust:
        give_keys(work)
    for site in load_run(work / "run.toml").run.sites:
        approve(work / f"{site}.toml", "benchmark")
    return work


def _work(name: str, work: Path, trust: bool) -> None:
    """Work to the end of the run, in a process of its own."""
    prepare_torch(1, "cpu")
    if not trust:
        SiteWorker.make_exit_log = lambda self: NoLog()  # type: ignore[method-assign]
    worker: ServerWorker | SiteWorker = (ServerWorker if name == SERVER else SiteWorker)(work / f"{name}.toml")
    worker.work()


def play(work: Path, trust: bool) -> tuple[float, float]:
    """Play a run with all workers online; return their CPU seconds, and wall seconds."""
    names = [SERVER, *load_run(work / "run.toml").run.sites]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    processes = [FORKS.Process(target=_work, args=(name, work, trust)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0, "a worker has failed"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - began


def microseconds(action: Callable[[], object], rounds: int = 60) -> float:
    """Median CPU time of one call."""
    times = []
    for _ in range(rounds):
        began = time.thread_time_ns()
        action()
        times.append(time.thread_time_ns() - began)
    return statistics.median(times) / 1000


def parts(folder: Path) -> Table:
    """Measure the stages for messages of three sizes."""
    identities = {name: Identity(secrets.token_bytes(32)) for name in (SERVER, "north")}
    parties = {name: identity.public for name, identity in identities.items()}
    north, server = (
        Sealer("run", "ab" * 32, name, identities[name], parties, RunKeys(folder / name)) for name in ("north", SERVER)
    )
    north.keys.learn(SERVER, server.keys.public)
    server.keys.learn("north", north.keys.public)
    log = ExitLog(folder / "exit_log.jsonl", "ab" * 32, folder / "policy.toml")
    payload = Payload(
        Kind.SMASHED, {"smashed": TensorSpec(torch.float32, (BATCH, 4), "fp16", reveals=Reveals.ACTIVATIONS)}
    )
    header = Header("run", "north", SERVER, Kind.SMASHED, 1)
    table = Table("bytes", "exit log, us", "sign and seal, us", "open and verify, us")
    for size in (200, 2**18, 2**20):
        content = secrets.token_bytes(size)
        body = north.seal(SERVER, content)
        figures = (
            microseconds(lambda c=content: log.write(header, payload, 16, [c])),
            microseconds(lambda c=content: north.seal(SERVER, c)),
            microseconds(lambda b=body: server.open("north", SERVER, b)),
        )
        table.add_row(f"{size:,}", *(f"{figure:.0f}" for figure in figures))
    log.close()
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", nargs="+", default=["cholesterol", "wide"], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    chosen = parser.parse_args(arguments)
    prepare_torch(1, "cpu")
    console = Console(width=120)
    with scratch() as folder, chdir(folder):
        console.print(parts(folder))
        table = Table("run", "bare, CPU s", "with trust, CPU s", "CPU ratio, median (least to most)", "wall ratio")
        for example in chosen.examples:
            bare, trusted = [], []
            for number in range(chosen.rounds):
                for trust in (False, True) if number % 2 else (True, False):
                    (trusted if trust else bare).append(play(prepared(example, folder, trust), trust))
                print(f"{example}: {bare[-1]} {trusted[-1]}", file=sys.stderr, flush=True)
            cpu, wall = ([after[n] / before[n] for before, after in zip(bare, trusted, strict=True)] for n in (0, 1))
            medians = (f"{statistics.median(seconds for seconds, _ in played):.2f}" for played in (bare, trusted))
            table.add_row(
                example, *medians, *(f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in (cpu, wall))
            )
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
