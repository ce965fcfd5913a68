"""What the benchmarks share: a private broker, processes, CPU time, medians over rounds, the table.

Speed on a shared machine drifts, so every figure that counts is a ratio of two things timed in the
same round, and the median over rounds. The load and the share of the cores that others took
are told with every round: a round in which others took much says little.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from broker.base import Broker, Queue
from broker.rabbitmq import RabbitBroker
from tests.services import RabbitNode

MiB = 2**20
_TICKS = os.sysconf("SC_CLK_TCK")
_SPAWN = multiprocessing.get_context("spawn")


# ── processes ───────────────────────────────────────────────────────────────────────────────────


class Worker:
    """A process of its own that runs `work(line, *arguments)`; both ends talk through `line`."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._line, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_run, args=(theirs, work, arguments), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def say(self, what: Any) -> None:
        """Send something."""
        self._line.send(what)

    def hear(self, timeout: float = 600.0) -> Any:
        """What the process says next; its exception, if it failed."""
        if not self._line.poll(timeout):
            raise TimeoutError(f"{self._process.name} said nothing for {timeout} s")
        what = self._line.recv()
        if isinstance(what, _Failed):
            raise RuntimeError(what.trace)
        return what

    def ask(self, what: Any, timeout: float = 600.0) -> Any:
        """`say`, then `hear`."""
        self.say(what)
        return self.hear(timeout)

    def end(self) -> None:
        """Wait for the end of the process, or bring it about."""
        self._process.join(10.0)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._process.kill()
        self.end()


@dataclass
class _Failed:
    trace: str


def _run(line: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(line, *arguments)
    except BaseException:
        line.send(_Failed(traceback.format_exc()))


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    """CPU time that a process, or one of its threads, has used (user and system)."""
    place = f"/proc/{pid}/task/{thread}/stat" if thread else f"/proc/{pid}/stat"
    fields = Path(place).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Others:
    """How many cores other programs took in a stretch of time, on average.

    Args:
        broker: process id of a broker that belongs to the measurement; ended workers count by themselves.
    """

    def __init__(self, broker: int | None = None) -> None:
        self._broker = broker
        self._used, self._at = self._read(), time.monotonic()

    def _read(self) -> float:
        numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        everything = (sum(numbers) - numbers[3] - numbers[4]) / _TICKS  # all but idle and waiting for the disk
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return everything - own - (cpu_seconds(self._broker) if self._broker else 0.0)

    def cores(self) -> float:
        """Since this object was made."""
        return max(0.0, self._read() - self._used) / max(1e-9, time.monotonic() - self._at)


def wait_for_quiet(patience: float) -> None:
    """Return when other programs leave the cores alone, or after `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        others = Others()
        time.sleep(2.0)
        if others.cores() < 0.1:
            return


# ── brokers ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Place:
    """A RabbitMQ server to measure with; `pid` is None where it is not ours."""

    url: str
    pid: int | None

    def broker(self, max_message_bytes: int = 16 * MiB) -> RabbitBroker:
        """Connects anew, as each process must for itself."""
        return RabbitBroker(self.url, max_message_bytes)


@contextmanager
def rabbitmq(url: str | None) -> Iterator[Place]:
    """The server at `url`, or a private node that ends with the block. Its queues are lazy."""
    if url is not None:
        yield Place(url, None)
        return
    with scratch() as folder, RabbitNode(folder / "rabbitmq") as node:
        vhost = node.vhost()
        (pid,) = _beams(folder)
        yield Place(vhost, pid)


def _beams(folder: Path) -> list[int]:
    """Erlang machines whose files are in `folder`."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                command = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if b"beam" in command.split(b"\0")[0] and str(folder).encode() in command:
                found.append(int(place.name))
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nightsplit-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def queues_of(broker: Broker, queues: list[Queue]) -> Iterator[None]:
    """Queues that are there within the block only."""
    broker.declare(queues)
    try:
        yield
    finally:
        broker.delete(queues)


def fresh_name(what: str) -> str:
    """A name that nobody has used."""
    return f"{what}-{uuid.uuid4().hex[:8]}"


# ── figures ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figure:
    """What is reported; with an aim and a floor where there is one to reach."""

    key: str
    what: str
    aim: float | None = None
    floor: float | None = None
    lower_is_better: bool = False

    def verdict(self, value: float) -> str:
        """One word on `value`."""
        if self.aim is None or self.floor is None:
            return ""
        sign = -1 if self.lower_is_better else 1
        if sign * value >= sign * self.aim:
            return "[green]aim[/green]"
        return "[yellow]floor[/yellow]" if sign * value >= sign * self.floor else "[red]below[/red]"


@dataclass
class Results:
    """Values per figure, one per round."""

    figures: list[Figure]
    patience: float = 0.0
    broker: int | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(width=None if Console().is_terminal else 160))

    def add(self, **values: float | None) -> None:
        """One round's values, by key."""
        for key, value in values.items():
            if value is not None:
                self.values.setdefault(key, []).append(value)

    def median(self, key: str) -> float:
        """Over all rounds so far."""
        return statistics.median(self.values[key])

    @contextmanager
    def round(self, what: str) -> Iterator[None]:
        """A stretch of measuring, with what the machine did beside it; all workers end within."""
        wait_for_quiet(self.patience)
        others, load = Others(self.broker), os.getloadavg()[0]
        yield
        cores = others.cores()
        self.add(others_cores=cores)
        warning = "  [red]disturbed[/red]" if cores > 0.2 else ""
        self.console.print(f"  {what}: load {load:.1f} before, others used {cores:.2f} cores meanwhile{warning}")

    def table(self, title: str) -> Table:
        """Median, spread, aim and floor of every figure that was measured."""
        table = Table(title=title)
        for column in ("figure", "key", "median", "from", "to", "rounds", "aim", "floor", ""):
            table.add_column(column, justify="left" if column in ("figure", "key", "") else "right")
        for figure in [*self.figures, Figure("others_cores", "cores that other programs took")]:
            if values := self.values.get(figure.key):
                middle = self.median(figure.key)
                shown = [_number(n) for n in (middle, min(values), max(values))]
                bounds = ["" if n is None else _number(n) for n in (figure.aim, figure.floor)]
                table.add_row(figure.what, figure.key, *shown, str(len(values)), *bounds, figure.verdict(middle))
        return table

    def finish(self, title: str, path: Path | None) -> None:
        """Print the table; write the medians to `path`, flat."""
        self.console.print(self.table(title))
        if path is not None:
            path.write_text(json.dumps({key: self.median(key) for key in self.values}, indent=2) + "\n")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 10 else f"{value:.3f}"


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="two short rounds: shows that it works, not how fast")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds whose median counts (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians to FILE")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="S", help="wait so long for other programs to be quiet"
    )
    parser.add_argument("--broker", metavar="URL", help="RabbitMQ to use; a private node is started without it")
    return parser
