"""Optimizers under late gradients: `split_u` at longer and longer windows, in three case studies.

    python -m benchmarks.accuracy.late --write       all of it, with one thread; into docs/reference/results.md
    python -m benchmarks.accuracy.late --quick       one seed of heart: shows that it works

Every figure is of a whole run with the real roles, in strict order, on the test patients of the epoch that is best on
validation patients. Only [optimizer] differs between rows. Needs the public data sets of the examples: set
NIGHTSPLIT_DATA, or see the error that says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from msgspec.structs import replace

from benchmarks.accuracy.results import print_tables, spread
from benchmarks.accuracy.study import AS_IS, CASES, prepared, train_split
from nightsplit.console.ui.text import counted
from nightsplit.shared.config.optimizer import OptimizerSection, PartSection

CASE_NAMES = ("radiograph", "heart", "cholesterol")
SEEDS = 3
WINDOWS = {"window 1": 1, "window 4": 4, "an epoch": None}
"""Window by name; None is one epoch of the largest site."""

OPTIMIZERS: dict[str, Callable[[OptimizerSection], OptimizerSection]] = {
    "as in the example": lambda own: own,
    "a quarter of lr": lambda own: replace(own, lr=own.lr / 4),
    "warm-up of 40 steps": lambda own: replace(own, warmup=40),
    "clip_norm = 0.1": lambda own: replace(own, clip_norm=0.1),
    "betas = [0.0, 0.999]": lambda own: replace(own, betas=(0.0, 0.999)),
    "betas = [0.0, 0.9]": lambda own: replace(own, betas=(0.0, 0.9)),
    "Muon, three times lr": lambda own: replace(own, name="muon", lr=3 * own.lr),
    "Muon at the top alone": lambda own: replace(own, top=PartSection(name="muon", lr=3 * own.lr)),
}
BEGIN = "<!-- late gradients: written by benchmarks/accuracy/late.py -->"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Optimizers under late gradients, with split_u.")
    parser.add_argument("--quick", action="store_true", help="one seed of heart: shows that it works")
    parser.add_argument("--case", choices=CASE_NAMES, action="append", help="this case alone (may be repeated)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reference/results.md")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, cases = (1, ["heart"]) if chosen.quick else (SEEDS, chosen.case or list(CASE_NAMES))
    return print_tables(cases, partial(table, seeds=seeds), BEGIN if chosen.write else None)


def table(case: str, seeds: int) -> list[str]:
    """Return a table of a case: optimizers in rows, windows in columns."""
    lead = CASES[case].figures[0]
    heading = [f"{case}, {lead}, {counted(seeds, 'seed')}", *WINDOWS]
    lines = [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * len(WINDOWS)}"]
    for name, settings in OPTIMIZERS.items():
        cells = []
        for window in WINDOWS.values():
            values = [figure(case, seed, window, settings) for seed in range(1, seeds + 1)]
            cells.append(spread(values))
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return [*lines, ""]


def figure(case: str, seed: int, window: int | None, settings: Callable[[OptimizerSection], OptimizerSection]) -> float:
    """Train once; return the leading figure on the test patients of all sites."""
    config, splits = prepared(case, seed, AS_IS)
    config = replace(config, optimizer=settings(config.optimizer))
    value = train_split("split_u", window, config, splits).pooled[CASES[case].figures[0]]
    assert value is not None
    return value


if __name__ == "__main__":
    sys.exit(main())
