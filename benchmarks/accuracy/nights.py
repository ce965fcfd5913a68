"""Figures by night: sites that work while the server is away, and a server that works while they are.

    python -m benchmarks.accuracy.nights --write      all of it, with one thread; into docs/reference/results.md
    python -m benchmarks.accuracy.nights --quick      one seed of heart: shows that it works

A night lets every site work until it has nothing left to do, with the server's last answers; the day after it is the
server's. So the number of nights that a method takes is counted and not computed. The figure of a night is that of the
epoch that is best on validation patients so far, on test patients; of the last one where there are none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace

from benchmarks.accuracy.results import print_tables, spread
from benchmarks.accuracy.study import AS_IS, CASES, prepared
from benchmarks.speed.common import scratch
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.wire.message import SERVER
from nightsplit.simulation.run import Simulation
from nightsplit.site_worker.data.dataset import Splits

CASE_NAMES = ("radiograph", "lung_ct", "heart", "cholesterol")
SEEDS = 3
NIGHTS = (1, 2, 3, 4, 6, 8, 12)
WHOLE_EPOCH = 10_000
"""A window that is longer than any site's epoch."""
METHODS: dict[str, dict[str, Any]] = {
    "split_u, steps, window 1": {"protocol": "split_u", "window": 1},
    "split_u, steps, a night": {"protocol": "split_u", "window": None},
    "split_u, targets": {"protocol": "split_u", "learning": "targets", "window": WHOLE_EPOCH},
    "split_labels, steps, window 1": {"protocol": "split_labels", "window": 1},
    "split_labels, steps, a night": {"protocol": "split_labels", "window": None},
    "split_labels, targets": {"protocol": "split_labels", "learning": "targets", "window": WHOLE_EPOCH},
}
"""Settings of [run] by method; window None is one epoch of the largest site."""
BEGIN = "<!-- figures by night: written by benchmarks/accuracy/nights.py -->"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Figures by night, for learning by steps and by targets.")
    parser.add_argument("--quick", action="store_true", help="one seed of heart: shows that it works")
    parser.add_argument("--case", choices=CASE_NAMES, action="append", help="this case alone (may be repeated)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="divisions of the patients (%(default)s)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reference/results.md")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, cases = (1, ["heart"]) if chosen.quick else (chosen.seeds, chosen.case or list(CASE_NAMES))
    return print_tables(cases, partial(table, seeds=seeds), BEGIN if chosen.write else None)


def table(case: str, seeds: int) -> list[str]:
    """Return a table of a case: methods in rows, nights in columns."""
    lead = CASES[case].figures[0]
    lines = [f"| {case}, {lead}, after night | {' | '.join(map(str, NIGHTS))} |", f"| --- |{' ---: |' * len(NIGHTS)}"]
    for name, settings in METHODS.items():
        runs = []
        for seed in range(1, seeds + 1):
            config, splits = prepared(case, seed, AS_IS)
            runs.append(by_night(configured(config, splits, settings), splits, lead))
        columns = [[run[night - 1] for run in runs] for night in NIGHTS]
        known = [[value for value in values if value is not None] for values in columns]
        cells = [spread(values) if len(values) == seeds else "" for values in known]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return [*lines, ""]


def configured(config: RunConfig, splits: Mapping[str, Splits], settings: Mapping[str, Any]) -> RunConfig:
    """Return the example's configuration with a method's settings, in strict order, evaluated after each epoch."""
    night = max(1, *(len(part.train) // config.run.batch_size for part in splits.values()))
    settings = {**settings, "window": settings["window"] or night}
    run = replace(
        config.run, **settings, order="strict", bottoms="independent", epochs=max(NIGHTS), evaluate_every=1, patience=0
    )
    return replace(config, run=run)


def by_night(config: RunConfig, splits: Mapping[str, Splits], lead: str) -> list[float | None]:
    """Return the figure after each night; None before the first evaluation."""
    figures: list[float | None] = []
    with scratch() as folder:
        simulation = Simulation(config, splits, folder)
        simulation.work(SERVER, idle_seconds=0.0)  # opens the run
        for _ in range(max(NIGHTS)):
            for worker in (*config.run.sites, SERVER):
                if worker not in simulation.finished:
                    simulation.work(worker, idle_seconds=0.0)
            evaluation = simulation.server.evaluation
            entry = evaluation.entry(evaluation.best)
            figures.append(None if entry is None else entry["overall"]["test"][lead])
    return figures


if __name__ == "__main__":
    sys.exit(main())
