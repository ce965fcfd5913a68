"""Quality of federated transfer and of added data vectors, beside pooled data and each hospital alone.

    python -m benchmarks.accuracy.federated              all tables (about half an hour on one core)
    python -m benchmarks.accuracy.federated --write      and put them into docs/reference/results.md

What has been trained is kept in the folder of `--keep`, by the contract of its run, so that an interrupted study
goes on. Needs the public data sets of the examples: set NIGHTSPLIT_DATA, or see the error that says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console

from benchmarks.accuracy.federated_study import (
    ALONE,
    DIVIDED,
    FROZEN,
    LABELS,
    MEDNIST,
    MEETING,
    PASSES,
    POOLED,
    RULED,
    SITES,
    SMALL_BATCH,
    TUNED,
    VECTORS,
    Job,
    Study,
)
from benchmarks.accuracy.results import spread, write_section
from nightsplit.console.ui.text import counted
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.storage.files import write_atomic

BEGIN = "<!-- figures: written by benchmarks/accuracy/federated.py -->"
SEEDS = 3
"""From 1; each gives another split of the patients, another division, other first weights and another order."""
QUARTER = 0.25
WITHIN, TRANSFER_GAIN, BEST = 1.0, 3.0, 0.90
"""Aims of fedavg_transfer: points below centralized, points above scratch at 25 % of the labels, best AUC."""
MERGED_GAIN, MERGED_WITHIN = 3.0, 3.0
"""Aims of data_vectors: points above the best hospital alone, points below all data together."""

Figures = dict[str, float]


class Done:
    """Trained results in a file.

    Args:
        folder: of the file and of the models of stage 1.
        quick: one seed, a tenth of the patients, two passes.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self._path, self._study = folder / "figures.json", Study(folder)
        self._quick = quick
        self.seeds = range(1, 2 if quick else SEEDS + 1)
        self._kept: dict[str, Figures] = json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}
        self._of: dict[Job, Figures] = {}

    def carry_out(self, job: Job, seed: int) -> Figures:
        """Train, unless the same was trained before."""
        job = self._at(job, seed)
        config, _ = self._study.prepare(job)
        key = f"{config.digest} {job.system}, {job.division}, labels {job.labels}"
        if key not in self._kept:
            self._kept[key] = self._study.carry_out(job)
            write_atomic(self._path, (json.dumps(self._kept, indent=1) + "\n").encode())
        self._of[job] = self._kept[key]
        return self._of[job]

    def values(self, job: Job, figure: str = "auc") -> list[float]:
        """A figure of a job that was carried out, seed by seed."""
        return [self._of[self._at(job, seed)][figure] for seed in self.seeds]

    def gains(self, job: Job, other: Job) -> list[float]:
        """Points of AUC above another job, within a seed."""
        return points(self.values(job), self.values(other))

    def _at(self, job: Job, seed: int) -> Job:
        return replace(job, seed=seed, quick=self._quick, passes=2 if self._quick else job.passes)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test figures of fedavg_transfer and data_vectors.")
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the patients: shows that it works")
    parser.add_argument("--table", choices=list(TABLES), action="append", help="this table alone (may be repeated)")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/federated"), metavar="FOLDER", help="what is done (%(default)s)"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reference/results.md")
    chosen = parser.parse_args(arguments)
    tables = [TABLES[name] for name in chosen.table or TABLES]
    chosen.keep.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True, highlight=False)
    began = time.monotonic()
    done = Done(chosen.keep, chosen.quick)
    todo = dict.fromkeys((job, seed) for jobs, _ in tables for seed in done.seeds for job in jobs)
    try:
        for number, (job, seed) in enumerate(todo, 1):
            figures = done.carry_out(job, seed)
            console.print(f"{number} of {len(todo)}: seed {seed}, {job}: {figures}", soft_wrap=True)
    except NightsplitError as error:
        print(error, file=sys.stderr)
        return 1
    text = "\n".join(line for _, section in tables for line in [*section(done), ""])
    print(text)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    if chosen.write:
        write_section(BEGIN, text)
    return 0


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


def transfer_section(done: Done) -> list[str]:
    """Sources, labels and aims."""
    lines = [
        "### fedavg_transfer: sources and labels",
        "",
        f"Lung CT, three sites of equal size, {counted(len(done.seeds), 'seed')}. {PASSES} rounds of one epoch; with a",
        f"part of the labels two epochs, in batches of {SMALL_BATCH}. AUC on the test patients of all sites as one",
        "group, mean ± standard deviation over seeds; points are taken within a seed.",
        "",
        "| first weights | trained | " + " | ".join(f"{share:.0%} of the labels" for share in LABELS)
        + " | points above scratch, 25% |",
        "| --- | --- |" + " ---: |" * (len(LABELS) + 1),
    ]  # fmt: skip
    for name, jobs in (("federated", TUNED), ("federated, backbone frozen", FROZEN)):
        for job in jobs:
            cells = [spread(done.values(replace(job, labels=share))) for share in LABELS]
            gains = done.gains(replace(job, labels=QUARTER), Job(labels=QUARTER))
            cells.append("" if job == Job() else spread(gains, "+.1f"))
            lines.append(f"| {job.source} | {name} | {' | '.join(cells)} |")
    for job in (*POOLED, *ALONE):
        lines.append(f"| {job.source} | {job.system} |{' |' * (len(LABELS) - 1)} {spread(done.values(job))} | |")
    best = max([*TUNED, *FROZEN], key=lambda job: statistics.mean(done.values(job)))
    aims = [
        (f"federated at most {WITHIN:g} below centralized, from scratch", done.gains(Job(), POOLED[0]), -WITHIN),
        (f"the same from {MEDNIST}", done.gains(Job(source=MEDNIST), POOLED[1]), -WITHIN),
        (
            f"{MEDNIST} at least {TRANSFER_GAIN:g} above scratch at {QUARTER:.0%} of the labels",
            done.gains(Job(source=MEDNIST, labels=QUARTER), Job(labels=QUARTER)),
            TRANSFER_GAIN,
        ),
        (f"best row, {best.source}: AUC {BEST:g}", points(done.values(best), [BEST] * len(done.seeds)), 0.0),
    ]
    return [*lines, "", *aims_table(aims)]


def division_section(done: Done) -> list[str]:
    """Write the table of divisions of patients among sites."""
    lines = [
        "### fedavg_transfer: how patients are divided",
        "",
        f"Lung CT, all labels, from scratch, {counted(len(done.seeds), 'seed')}; the same test patients in every row.",
        "",
        "| training patients | federated | points against centralized |",
        "| --- | ---: | ---: |",
    ]
    for name, job in DIVIDED.items():
        gains = spread(done.gains(job, POOLED[0]), "+.1f")
        lines.append(f"| {name} | {spread(done.values(job))} | {gains} |")
    return [*lines, f"| centralized | {spread(done.values(POOLED[0]))} | |"]


def epoch_section(done: Done) -> list[str]:
    """Write the table of rounds."""
    lines = [
        "### fedavg_transfer: local epochs",
        "",
        f"As above, IID, {PASSES} passes over the training patients in each row.",
        "",
        "| local epochs | rounds | federated |",
        "| ---: | ---: | ---: |",
    ]
    for epochs, job in MEETING.items():
        lines.append(f"| {epochs} | {PASSES // epochs} | {spread(done.values(job))} |")
    return lines


def rule_section(done: Done) -> list[str]:
    """Write the table of ways to combine models."""
    lines = [
        "### fedavg_transfer: combining and closing",
        "",
        "As above, IID, 25% of the labels. The last two in fair order, with as many updates in all as the others; no",
        "site is slow.",
        "",
        "| rule | federated | points against mean |",
        "| --- | ---: | ---: |",
    ]
    for name, job in RULED.items():
        gains = "" if name == "mean" else spread(done.gains(job, RULED["mean"]), "+.1f")
        lines.append(f"| {name} | {spread(done.values(job))} | {gains} |")
    return lines


def vector_section(done: Done) -> list[str]:
    """data_vectors, on two data sets."""
    lines = [
        "### data_vectors",
        "",
        f"Three hospitals of equal size, {PASSES} epochs each, all from one model that knows {MEDNIST},",
        f"{counted(len(done.seeds), 'seed')}. The scale is the one that validation patients chose.",
        "",
        f"| AUC, pooled | {' | '.join(VECTORS)} |",
        f"| --- |{' ---: |' * len(VECTORS)}",
    ]
    hospitals = [f"{site} alone" for site in SITES]
    for row in (*hospitals, "all data", "one-shot mean", "sum", "merged", "random vectors"):
        lines.append(f"| {row} | {' | '.join(spread(done.values(job, row)) for job in VECTORS.values())} |")
    scales = [", ".join(f"{scale:g}" for scale in done.values(job, "scale")) for job in VECTORS.values()]
    lines.append(f"| scale, seed by seed | {' | '.join(scales)} |")
    aims = []
    for case, job in VECTORS.items():
        merged, alone = done.values(job, "merged"), [done.values(job, hospital) for hospital in hospitals]
        best = max(alone, key=statistics.mean)
        worst = [min(values) for values in zip(*alone, strict=True)]
        aims += [
            (f"{case}: merged at least {MERGED_GAIN:g} above the best hospital", points(merged, best), MERGED_GAIN),
            (
                f"{case}: merged at most {MERGED_WITHIN:g} below all data",
                points(merged, done.values(job, "all data")),
                -MERGED_WITHIN,
            ),
            (
                f"{case}: random vectors below every hospital",
                [-gain for gain in points(done.values(job, "random vectors"), worst)],
                0.0,
            ),
        ]
    return [*lines, "", *aims_table(aims)]


def aims_table(aims: Sequence[tuple[str, Sequence[float], float]]) -> list[str]:
    """Each aim with the points reached; it is reached when their mean is at least the last entry."""
    lines = ["| aim | reached (points of AUC) | |", "| --- | ---: | --- |"]
    for aim, gains, least in aims:
        verdict = "reached" if statistics.mean(gains) >= least else "missed"
        lines.append(f"| {aim} | {spread(gains, '+.1f')} | {verdict} |")
    return lines


def points(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Differences, seed by seed, in points."""
    return [100 * (value - other) for value, other in zip(values, others, strict=True)]


TABLES: dict[str, tuple[list[Job], Callable[[Done], list[str]]]] = {
    "transfer": (
        [*(replace(job, labels=n) for n in LABELS for job in (*TUNED, *FROZEN)), *POOLED, *ALONE],
        transfer_section,
    ),
    "vectors": ([*VECTORS.values()], vector_section),
    "divisions": ([*DIVIDED.values(), POOLED[0]], division_section),
    "epochs": ([*MEETING.values()], epoch_section),
    "rules": ([*RULED.values()], rule_section),
}
"""Jobs of each table, and its text."""


if __name__ == "__main__":
    sys.exit(main())
