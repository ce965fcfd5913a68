"""Quality of the models: every case study, system and sweep, several seeds, beside the aim.

    python -m benchmarks.accuracy.results              all of it (about 20 minutes on two cores)
    python -m benchmarks.accuracy.results --write      and put the tables into docs/reference/results.md

Needs the public data sets of the examples: set NIGHTSPLIT_DATA, or see the error that says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from benchmarks.accuracy.study import AS_IS, CASES, RATIOS, SITES, SWEPT, Case, Job, carry_out, jobs, sites_of, systems
from nightsplit.console.ui.text import counted
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.learning.metrics import Metrics

PROCESSES = 2
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "results.md"
BEGIN, END = "<!-- figures: written by benchmarks/accuracy/results.py -->", "<!-- end of figures -->"
WITHIN = {SWEPT: 1.0, "split_labels, a night": 2.5, "split_frozen": 1.0}
"""Lung CT: points of AUC that a system may lose against centralized training."""
ABOVE = 4.0
"""Lung CT: points of AUC that these systems are to gain over the best single site."""

Done = Mapping[Job, Mapping[str, Metrics]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test figures of every case study and system.")
    parser.add_argument("--quick", action="store_true", help="one seed, a fifth of the epochs: shows that it works")
    parser.add_argument("--case", choices=list(CASES), action="append", help="this case alone (may be repeated)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write means and deviations to FILE, flat")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reference/results.md")
    chosen = parser.parse_args(arguments)
    cases = [CASES[name] for name in chosen.case or CASES]
    began = time.monotonic()
    try:
        done = _carry_out(
            [job for case in cases for job in jobs(case, 1 if chosen.quick else case.seeds, chosen.quick)]
        )
    except NightsplitError as error:
        print(error, file=sys.stderr)
        return 1
    text = "\n".join(_section(case, done) for case in cases)
    print(text)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(_flat(done), indent=2) + "\n", encoding="utf-8")
    if chosen.write:
        write_section(BEGIN, text)
    return 0


def print_tables(cases: Sequence[str], table: Callable[[str], list[str]], begin: str | None) -> int:
    """Print the table of each case; put them into the results page behind `begin`, if given. Return the exit code."""
    try:
        text = "\n".join("\n".join(table(case)) for case in cases)
    except NightsplitError as error:
        print(error, file=sys.stderr)
        return 1
    print(text)
    if begin is not None:
        write_section(begin, text)
    return 0


def write_section(begin: str, text: str) -> None:
    """Put a text into the results page between `begin` and the next `END`; at the end, where `begin` is not there."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(END)[2] or "\n"
    PAGE.write_text(f"{before}{begin}\n\n{text}\n{END}{after}", encoding="utf-8")


def _carry_out(todo: Sequence[Job]) -> Done:
    """All trainings, two at a time."""
    console = Console(stderr=True, highlight=False)
    context = multiprocessing.get_context("spawn")
    done: dict[Job, Mapping[str, Metrics]] = {}
    with ProcessPoolExecutor(PROCESSES, context) as pool:
        futures = {pool.submit(carry_out, job): job for job in todo}
        try:
            for future in as_completed(futures):
                job = futures[future]
                done[job] = future.result()
                figure = CASES[job.case].figures[0]
                value = done[job]["pooled"][figure] or 0.0
                console.print(
                    f"{len(done)} of {len(todo)}: {job.case}, seed {job.seed}, {job.division}, {job.system}: "
                    f"{figure} {value:.3f}"
                )
        finally:
            pool.shutdown(cancel_futures=True)
    return done


# ── tables ──────────────────────────────────────────────────────────────────────────────────────


def _section(case: Case, done: Done) -> str:
    """Return the section of docs/reference/results.md about a case."""
    seeds = len({job.seed for job in done if job.case == case.name})
    part = "" if case.subset == 1 else f", {case.subset:.0%} of the patients"
    text = [
        f"## {case.name}",
        "",
        f"{counted(seeds, 'seed')}{part}; mean ± standard deviation over seeds.",
        "",
    ]
    text += _main_table(case, done)
    if case.name == "lung_ct":
        text += ["", *_aims(case, done)]
    if case.sweeps:
        text += ["", *_sweep_table(case, done)]
    return "\n".join([*text, ""])


def _main_table(case: Case, done: Done) -> list[str]:
    """Systems in rows; all test patients as one group, then those of each site."""
    sites = sites_of(case)
    lead, *others = case.figures
    heading = [f"{lead}, pooled", "points against centralized", *others, "mean of sites", *sites]
    lines = [f"| trained | {' | '.join(heading)} |", f"| --- |{' ---: |' * len(heading)}"]
    reference = _values(case, done, "centralized", lead)
    for system in systems(sites):
        values = _values(case, done, system, lead)
        gains = [100 * (value - other) for value, other in zip(values, reference, strict=True)]
        cells = [spread(values), "" if system == "centralized" else spread(gains, "+.1f")]
        cells += [spread(_values(case, done, system, figure), ".2f") for figure in others]
        cells += [spread(_values(case, done, system, lead, group="all"))]
        cells += [_mean(_values(case, done, system, lead, group=site)) for site in sites]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return lines


def _sweep_table(case: Case, done: Done) -> list[str]:
    """More sites, and more unequal ones, of the same patients."""
    lines = [f"| {SWEPT} | {' | '.join(case.figures)} |", f"| --- |{' ---: |' * len(case.figures)}"]
    for division in (*SITES, *RATIOS):
        figures = [_values(case, done, SWEPT, figure, division) for figure in case.figures]
        lines.append(f"| {division} | {' | '.join(spread(values) for values in figures)} |")
    return lines


def _aims(case: Case, done: Done) -> list[str]:
    """Each aim with the figure reached; differences are taken within a seed."""
    reference = _values(case, done, "centralized", "auc")
    single = max((_values(case, done, f"{s} alone", "auc") for s in sites_of(case)), key=statistics.mean)
    lines = ["| aim | reached (points of AUC) | |", "| --- | ---: | --- |"]
    for system, limit in WITHIN.items():
        values = _values(case, done, system, "auc")
        for other, least, aim in (
            (reference, -limit, f"at most {limit:g} below centralized"),
            (single, ABOVE, f"at least {ABOVE:g} above the best single site"),
        ):
            gains = [100 * (value - o) for value, o in zip(values, other, strict=True)]
            verdict = "reached" if statistics.mean(gains) >= least else "missed"
            lines.append(f"| {system}: {aim} | {spread(gains, '+.1f')} | {verdict} |")
    return lines


def _values(
    case: Case, done: Done, system: str, figure: str, division: str = AS_IS, group: str = "pooled"
) -> list[float]:
    """A figure, seed by seed."""
    chosen = [job for job in done if (job.case, job.division, job.system) == (case.name, division, system)]
    values = [done[job][group][figure] for job in sorted(chosen, key=lambda job: job.seed)]
    return [float("nan") if value is None else value for value in values]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def _mean(values: Sequence[float]) -> str:
    """Format the mean over the seeds in which a small site's test patients are of both classes."""
    known = [value for value in values if value == value]
    return f"{statistics.mean(known):.3f}" if known else "-"


def _flat(done: Done) -> dict[str, float]:
    """Means and deviations of the pooled figures, e.g. lung_ct/split_frozen/auc/mean."""
    flat = {}
    for job in done:
        for figure in CASES[job.case].figures:
            values = _values(CASES[job.case], done, job.system, figure, job.division)
            division = "" if job.division == AS_IS else f"{job.division}/"
            key = f"{job.case}/{division}{job.system}/{figure}".replace(", ", "_").replace(" ", "_")
            flat[f"{key}/mean"] = statistics.mean(values)
            flat[f"{key}/sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return flat


if __name__ == "__main__":
    sys.exit(main())
