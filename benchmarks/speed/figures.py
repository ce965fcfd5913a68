"""Report of the benchmarks: medians over rounds, beside aim and floor.

Speed on a shared machine drifts, so every figure that counts is a ratio of two things timed in the
same round, and the median over rounds. The load and the cores that other programs took are told with
every round: a round in which others took much says little.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.speed.common import TICKS, cpu_seconds

DISTURBED = 0.2
"""Cores that other programs may take before a round counts as disturbed."""


class Others:
    """Measure the cores that other programs took in a stretch of time, on average.

    Args:
        broker: process id of a broker that belongs to the measurement; ended workers count by themselves.
    """

    def __init__(self, broker: int | None = None) -> None:
        self._broker = broker
        self._used, self._at = self._read(), time.monotonic()

    def _read(self) -> float:
        numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        everything = (sum(numbers) - numbers[3] - numbers[4]) / TICKS  # all but idle and waiting for the disk
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


@dataclass(frozen=True)
class Figure:
    """Figure of a report; with an aim and a floor where there is one to reach."""

    key: str
    what: str
    aim: float | None = None
    floor: float | None = None
    lower_is_better: bool = False

    def verdict(self, value: float) -> str:
        """One word on `value`."""
        if self.aim is None or self.floor is None:
            return ""
        sign, value = -1 if self.lower_is_better else 1, round(value, 2)
        if sign * value >= sign * self.aim:
            return "[green]aim[/green]"
        return "[yellow]floor[/yellow]" if sign * value >= sign * self.floor else "[red]below[/red]"


@dataclass
class Results:
    """Values per figure, one per round."""

    figures: list[Figure]
    patience: float
    retries: int
    broker: int | None
    values: dict[str, list[float]] = field(default_factory=dict)
    console: Console = field(default_factory=lambda: Console(width=None if Console().is_terminal else 160))

    def add(self, values: Mapping[str, float]) -> None:
        """One round's values, by key."""
        for key, value in values.items():
            self.values.setdefault(key, []).append(value)

    def median(self, key: str) -> float:
        """Over all rounds so far."""
        return statistics.median(self.values[key])

    def round(self, what: str, work: Callable[[], Mapping[str, float]]) -> None:
        """Add the measurements of `work`; its workers end within.

        A disturbed attempt is made again where the options allow it; the least disturbed one counts.
        """
        attempts = []
        for _ in range(1 + self.retries):
            wait_for_quiet(self.patience)
            others, load = Others(self.broker), os.getloadavg()[0]
            values = work()
            cores = others.cores()
            attempts.append((cores, values))
            key, first = next(iter(values.items()))
            told = f"  {what}: {key} {_number(first)}, load {load:.1f} before, others used {cores:.2f} cores meanwhile"
            if cores <= DISTURBED:
                self.console.print(told)
                break
            self.console.print(f"{told} [red]disturbed[/red]")
        cores, values = min(attempts, key=lambda attempt: attempt[0])
        self.add(values)
        self.add({"others_cores": cores})

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
    """The options that all benchmarks have. From here on SIGTERM ends the process in order, broker included."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short rounds: shows that it works, not how fast")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds whose median counts (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians to FILE")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="S", help="wait so long for other programs to be quiet"
    )
    parser.add_argument(
        "--retries", type=int, default=0, metavar="N", help="measure a disturbed round again, up to so many times"
    )
    parser.add_argument("--broker", metavar="URL", help="RabbitMQ to use; a private node is started without it")
    return parser
