"""Poisoning: losses of four honest hospitals by a hostile fifth one, in every system that trains.

    python -m benchmarks.accuracy.poison               all of it (about half an hour on two cores)
    python -m benchmarks.accuracy.poison --quick       one seed of one case: shows that it works

Each figure is a difference of test R2 or AUC, in points, over the patients of the four honest hospitals: a run with the
attack, less the run of these four alone with the same seed. The interval is that of the mean over seeds, 95 % by
Student's t. Needs the public data of examples/heart: set NIGHTSPLIT_DATA, or see the error that says so.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from msgspec import structs
from scipy.stats import t as student_t
from typing_extensions import override

from benchmarks.accuracy.study import EXAMPLES, folder_of
from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.engine.effects import Effect, Send
from nightsplit.shared.engine.engine import Engine
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.wire.message import Kind
from nightsplit.simulation.run import Simulation
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.role import SiteRole

PROCESSES = 2
SEEDS = 3
HALVES = ((0.0, 0.5), (0.5, 1.0))


@dataclass(frozen=True)
class Case:
    """Example of five hospitals.

    Attributes:
        name: folder of the example.
        figure: of `Metrics`.
        hospitals: file and share of its patients, by name of the hospital.
        hostile: one of them.
    """

    name: str
    figure: str
    hospitals: Mapping[str, tuple[str, tuple[float, float]]]
    hostile: str


CASES = (
    Case(
        "cholesterol", "r2",
        {
            **{f"north{n}": ("north", half) for n, half in enumerate(HALVES, 1)},
            **{f"south{n}": ("south", half) for n, half in enumerate(HALVES, 1)},
            "east": ("east", (0.0, 1.0)),
        },
        hostile="south2",
    ),
    Case(
        "heart", "auc",
        {
            **{f"cleveland{n}": ("cleveland", half) for n, half in enumerate(HALVES, 1)},
            **{name: (name, (0.0, 1.0)) for name in ("hungarian", "switzerland", "va")},
        },
        hostile="hungarian",
    ),
)  # fmt: skip

# ── attacks ─────────────────────────────────────────────────────────────────────────────────────

Change = Callable[[Send], Send]


def times(factor: float, kind: Kind, *names: str) -> Change:
    """Multiply tensors of a kind of message; all of them without names."""

    def change(send: Send) -> Send:
        if send.kind is not kind:
            return send
        scaled = {name: t * factor if not names or name in names else t for name, t in send.tensors.items()}
        return replace(send, tensors=scaled)

    return change


def claim(samples: int) -> Change:
    """Announce so many training samples."""

    def change(send: Send) -> Send:
        if send.kind is not Kind.HELLO or not send.scalars["enrolled"]:
            return send
        return replace(send, scalars={**send.scalars, "train": samples})

    return change


def flip(config: RunConfig, splits: Splits) -> Splits:
    """Return the splits with wrong labels: the other class, or the target's mirror image about its mean."""
    total = 2 * config.data.target_mean if config.task.kind == "regression" else 1.0
    parts = (splits.train, splits.validation, splits.test)
    return Splits(*(replace(part, targets=total - part.targets) for part in parts))


def poison(role: SiteRole, change: Change) -> None:
    """Make a site's role change all that it sends."""
    for name in ("start", "next", "on", "saved"):
        setattr(role, name, partial(_changed, getattr(role, name), change))


def _changed(honest: Callable[..., list[Effect]], change: Change, *arguments: object) -> list[Effect]:
    return [change(effect) if isinstance(effect, Send) else effect for effect in honest(*arguments)]


FLIP = "flipped labels"
SMASHED: Mapping[str, Change | None] = {
    "activations x 10^6": times(1e6, Kind.SMASHED, "smashed"),
    "activations x -10": times(-10.0, Kind.SMASHED, "smashed"),
    FLIP: None,
}
LABELS: Mapping[str, Change | None] = {**SMASHED, "labels + 100": lambda send: add_to_targets(send, 100.0)}
WEIGHTS: Mapping[str, Change | None] = {
    "update x 10^6": times(1e6, Kind.UPDATE),
    "update x -10": times(-10.0, Kind.UPDATE),
    "update x -3.5, just within the bound": times(-3.5, Kind.UPDATE),
    "10^9 samples": claim(10**9),
    FLIP: None,
}
SYSTEMS: Mapping[str, Mapping[str, Change | None]] = {
    "split_labels": LABELS,
    "split_labels, averaged": {
        **LABELS,
        "bottom x 10^6": times(1e6, Kind.BOTTOM),
        "bottom x -10": times(-10.0, Kind.BOTTOM),
    },
    "split_u": {**SMASHED, "gradient at the head x 10^6": times(1e6, Kind.HEAD_GRADIENT)},
    "split_frozen": LABELS,
    "fedavg_transfer": WEIGHTS,
    "data_vectors": WEIGHTS,
}
"""Attacks by system; None for one by the data alone."""


def add_to_targets(send: Send, value: float) -> Send:
    """Add to the standardised targets of regression; labels of classes that are none are refused."""
    targets = send.tensors.get("targets")
    return send if targets is None else replace(send, tensors={**send.tensors, "targets": targets + value})


# ── runs ────────────────────────────────────────────────────────────────────────────────────────


class HostileSimulation(Simulation):
    """Run with a hostile site, which changes its messages."""

    hostile = ""
    change: Change | None = None

    @override
    def _build_engine(self, worker: str) -> Engine:
        engine = super()._build_engine(worker)
        role = self.roles[worker]
        if worker == self.hostile and self.change is not None and isinstance(role, SiteRole):
            poison(role, self.change)
        return engine


@dataclass(frozen=True)
class Job:
    """One run; `attack` is None for the four honest hospitals alone, "" for five honest ones."""

    case: int
    system: str
    seed: int
    attack: str | None


def carry_out(job: Job) -> tuple[float, Mapping[str, int]]:
    """Return the figure over the four honest hospitals, and the outliers of each site; NaN if the run broke off."""
    torch.set_num_threads(1)
    case = CASES[job.case]
    config, splits = _prepared(case, job)
    honest = {site: part for site, part in splits.items() if site != case.hostile}
    if job.attack == FLIP:
        splits = {**splits, case.hostile: flip(config, splits[case.hostile])}
    with tempfile.TemporaryDirectory(prefix="nightsplit-poison-") as folder:
        run = HostileSimulation(config, splits, Path(folder))
        run.hostile, run.change = case.hostile, SYSTEMS[job.system].get(job.attack or "")
        try:
            figures = run.run().evaluate(honest)
        except NightsplitError:
            return math.nan, {}
    return figures.overall[case.figure] or 0.0, {site: c.total() for site, c in run.server.outliers.items() if c}


def _prepared(case: Case, job: Job) -> tuple[RunConfig, dict[str, Splits]]:
    config, folder = load_run(EXAMPLES / case.name / "run.toml"), folder_of(case.name)
    sites = [site for site in case.hospitals if job.attack is not None or site != case.hostile]
    protocol, _, averaged = job.system.partition(", ")
    epochs = config.run.epochs // 3  # further ones change little
    run = structs.replace(config.run, seed=job.seed, sites=sites, protocol=protocol, window=4, epochs=epochs)
    if averaged:
        run = structs.replace(run, bottoms="averaged", average_every=4)
    section = config.round
    if job.system == "fedavg_transfer":
        section = structs.replace(section, rounds=12, local_epochs=3)
    elif job.system == "data_vectors":
        section = structs.replace(section, rounds=1, local_epochs=20)
    config = structs.replace(config, run=run, round=section)
    splits = {}
    for site in sites:
        file, (first, last) = case.hospitals[site]
        source = load(folder / f"{file}.toml", SiteConfig).data
        source = structs.replace(source, share=(first, last))
        splits[site] = scale(read_splits(source, config, folder), config.data)
    return config, splits


# ── table ───────────────────────────────────────────────────────────────────────────────────────


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What honest hospitals lose by a hostile one.")
    parser.add_argument("--quick", action="store_true", help="one seed of one case")
    parser.add_argument("--system", choices=list(SYSTEMS), action="append", help="this system alone (may be repeated)")
    parser.add_argument("--attack", action="append", help="this attack alone (may be repeated)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="each another division of the patients")
    chosen = parser.parse_args(arguments)
    cases, seeds = (CASES[:1], 1) if chosen.quick else (CASES, chosen.seeds)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        for index, case in enumerate(cases):
            print(f"\n| {case.name}, hostile {case.hostile} | points of {case.figure.upper()} | outliers |")
            print("| --- | ---: | --- |")
            for system in chosen.system or SYSTEMS:
                attacks = [a for a in SYSTEMS[system] if case.figure == "r2" or not a.startswith("labels +")]
                attacks = [attack for attack in attacks if attack in (chosen.attack or attacks)]
                rows = {a: [Job(index, system, seed, a) for seed in range(1, seeds + 1)] for a in (None, "", *attacks)}
                done = {attack: list(pool.map(carry_out, jobs)) for attack, jobs in rows.items()}
                alone = [figure for figure, _ in done[None]]
                print(f"| **{system}**: the four alone {statistics.mean(alone):.3f} | | |")
                for attack in ("", *attacks):
                    losses = [100 * (figure - base) for (figure, _), base in zip(done[attack], alone, strict=True)]
                    named = sum((Counter(counts) for _, counts in done[attack]), Counter[str]())
                    outliers = ", ".join(f"{site} {count}" for site, count in named.most_common())
                    print(f"| {attack or 'five honest hospitals'} | {interval(losses)} | {outliers} |", flush=True)
    return 0


def interval(values: Sequence[float]) -> str:
    """Return mean and half the width of its 95 % interval."""
    if any(math.isnan(value) for value in values):
        return "the run breaks off"
    if len(values) < 2:
        return f"{values[0]:+.1f}"
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.1f} ± {half:.1f}"


if __name__ == "__main__":
    sys.exit(main())
