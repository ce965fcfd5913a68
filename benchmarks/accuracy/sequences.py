"""Quality of networks that classify sequences that can also be evaluated encrypted (`he_clstm`), beside baselines.

    python -m benchmarks.accuracy.sequences              all tables (about 35 minutes of one core)
    python -m benchmarks.accuracy.sequences --write      and put them into docs/reference/results.md

Networks are trained in the clear; those that can be are also asked encrypted. What is done is kept in the folder of
`--keep`, so that an interrupted study goes on. Needs the public data sets of the examples: set NIGHTSPLIT_DATA, or see
the error that says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from msgspec.structs import replace
from rich.console import Console

from benchmarks.accuracy.federated import points
from benchmarks.accuracy.results import spread, write_section
from benchmarks.accuracy.sequences_hippocampus import FRAMES as SLICES
from benchmarks.accuracy.sequences_hippocampus import PITCH, PLACES
from benchmarks.accuracy.sequences_hippocampus import SIDE as EXTENT
from benchmarks.accuracy.sequences_material import FRAMES, SIDE, TEST
from benchmarks.accuracy.sequences_study import SPECIFICITY, WEIGHTS, Case, Figures, Job, Study, regression
from nightsplit.console.ui.text import counted
from nightsplit.shared.errors import NightsplitError

BEGIN = "<!-- figures: written by benchmarks/accuracy/sequences.py -->"
SEEDS = (4, 5, 6)
"""Each gives other test patients, other first weights and another order. Nothing was chosen by their results."""
AUC, WITHIN, ENCRYPTED = 0.94, 0.2, 1e-4
"""Aims: AUC on hippocampus, the points of AUC that one_shot may lose against the polynomial LSTM, and the AUC that any
may lose when it is asked encrypted."""
CASES: tuple[Case, ...] = ("hippocampus", "lung CT figures", "XOR of two events")

REFERENCE = "polynomial LSTM"
HEAD = (
    "## Sequences of images",
    "",
    "`python -m benchmarks.accuracy.sequences --write`: the networks of `he_clstm`, trained unencrypted, with all",
    "data in one place. Schedules were chosen on other divisions of the same volumes.",
    "",
)
NETWORKS = {
    "plain LSTM (ReLU, sigmoid, tanh)": Job(network="plain"),
    REFERENCE: Job(),
    "one_shot": Job(network="one_shot"),
    "polynomial without LSTM": Job(without="LSTM"),
    "polynomial without weighted unit": Job(without="weighted unit"),
    "polynomial without voting": Job(without="voting"),
}
WITHOUT_MASKS = {"polynomial, encoder without masks": Job(without="masks")}
SETTINGS = {"refresh, slots": (Job(), "slots"), "one_shot, batch": (Job(network="one_shot"), "batch")}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Test figures of networks that classify sequences.")
    parser.add_argument("--quick", action="store_true", help="one seed, a single pass: shows that it works")
    parser.add_argument("--case", choices=CASES, action="append", help="this case alone (may be repeated)")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/sequences"), metavar="FOLDER", help="what is done (%(default)s)"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reference/results.md")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.monotonic()
    tables = Tables(Study(chosen.keep), chosen.quick)
    try:
        text = "\n".join([*HEAD, *(line for case in chosen.case or CASES for line in [*tables.of(case), ""])])
    except NightsplitError as error:
        print(error, file=sys.stderr)
        return 1
    print(text)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    if chosen.write:
        write_section(BEGIN, text)
    return 0


class Tables:
    """Section of docs/reference/results.md.

    Args:
        study: trains.
        quick: one seed, a single pass.
    """

    def __init__(self, study: Study, quick: bool) -> None:
        self._study, self._quick = study, quick
        self._seeds = SEEDS[:1] if quick else SEEDS
        self._console = Console(stderr=True, highlight=False)

    def of(self, case: Case) -> list[str]:
        """All tables of a case."""
        lines = self._networks(case)
        if case != "lung CT figures":
            lines += ["", *self._encrypted(case)]
        if case == "hippocampus":
            lines += ["", *self._weights(case)]
        return lines

    def _networks(self, case: Case) -> list[str]:
        """Networks, ablations, regressions and aims."""
        networks = NETWORKS | (WITHOUT_MASKS if case == "hippocampus" else {})
        found = {name: self._figures(replace(job, case=case)) for name, job in networks.items()}
        seen = [self._study.material(Job(case=case, seed=seed, quick=self._quick)) for seed in self._seeds]
        simple = [regression(of) for of in seen]
        reference = _values(found[REFERENCE], "auc")
        about = (
            f"{DESCRIPTION[case]} {len(seen[0].train)} training sequences and {len(seen[0].test)} test sequences, "
            f"{counted(len(self._seeds), 'seed')}; mean ± standard deviation over seeds, points within a seed."
        )
        columns = f"AUC | points against {REFERENCE} | sensitivity at specificity {SPECIFICITY:g} | balanced accuracy"
        lines = [f"### Sequences: {case}", "", *_paragraph(about), ""]
        lines += [f"| classifier | {columns} |", "| --- | ---: | ---: | ---: | ---: |"]
        rows = found | {f"logistic regression: {name}": [of[name] for of in simple] for name in seen[0].simple}
        for name, figures in rows.items():
            gains = points(_values(figures, "auc"), reference)
            cells = [spread(_values(figures, "auc")), "" if name == REFERENCE else spread(gains, "+.1f")]
            cells += [spread(_values(figures, figure)) for figure in ("sensitivity", "balanced accuracy")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        gains = points(_values(found["one_shot"], "auc"), reference)
        lines += ["", "| aim | reached | |", "| --- | ---: | --- |"]
        lines.append(_aim(f"one_shot at most {WITHIN:g} points below the {REFERENCE}", gains, -WITHIN, "+.2f"))
        if case == "hippocampus":
            lines.append(_aim(f"{REFERENCE}: AUC above {AUC:g}", reference, AUC, ".3f"))
        return lines

    def _encrypted(self, case: Case) -> list[str]:
        """Compare results with and without encryption."""
        lines = ["Test sequences classified encrypted, each seed with a new key pair. Differences: the largest.", ""]
        lines.append("| setting | AUC | difference to plain | changed decisions | error of a logit | aim |")
        lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
        for name, (job, packing) in SETTINGS.items():
            jobs = [replace(job, case=case, seed=seed, quick=self._quick) for seed in self._seeds]
            found = [self._study.encrypted(of_seed, packing) for of_seed in jobs]
            away, error = (max(abs(value) for value in _values(found, of)) for of in ("auc above plain", "error"))
            flipped = sum(_values(found, "flipped"))
            verdict = "reached" if away < ENCRYPTED and not flipped else "missed"
            asked = sum(_values(found, "sequences"))
            cells = [spread(_values(found, "auc")), f"{away:.6f}", f"{flipped:g} of {asked:g}", f"{error:.0e}", verdict]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines

    def _weights(self, case: Case) -> list[str]:
        """Compare a weight of ill patients in the loss with a threshold without one."""
        about = (
            f"Missed diagnoses. Left: {REFERENCE}, the ill count w times in the loss, called ill from probability 0.5. "
            "Right: trained without a weight, called ill from probability 1 / (1 + w)."
        )
        lines = [*_paragraph(about), "", "| w | AUC | sensitivity | specificity | sensitivity | specificity |"]
        lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
        moved = self._figures(Job(case=case))
        for weight in WEIGHTS:
            found = self._figures(Job(case=case, weight=weight))
            cells = [spread(_values(found, name)) for name in ("auc", "sensitivity at 1", "specificity at 1")]
            cells += [spread(_values(moved, f"{name} at {weight:g}")) for name in ("sensitivity", "specificity")]
            lines.append(f"| {weight:g} | {' | '.join(cells)} |")
        return lines

    def _figures(self, job: Job) -> list[Figures]:
        """Seed by seed."""
        found = []
        for seed in self._seeds:
            of_seed = replace(job, seed=seed, quick=self._quick)
            found.append(self._study.figures(of_seed))
            self._console.print(f"{of_seed}: AUC {found[-1]['auc']:.4f}", soft_wrap=True)
        return found


DESCRIPTION: dict[Case, str] = {
    "hippocampus": f"""{SLICES} slices, {PITCH} mm apart, around the middle of each of 260 MRI volumes, a pixel a mm,
        {EXTENT}x{EXTENT}. Label: whether the hippocampus, by the expert's mask of the whole volume, is larger than the
        median of the training volumes. {TEST:.0%} of the volumes are for the test. A training volume gives
        {len(PLACES)} sequences, 1 mm apart. In all rows but one the encoder was trained on the experts' masks
        of all slices of the training volumes, and is not changed when a classifier is trained on its outputs.""",
    "lung CT figures": f"""Images of one figure or one case, in the order of their numbers, as {FRAMES} frames of
        {SIDE}x{SIDE}. COVID-19 or not; divided by article or case, {TEST:.0%} of them for the test.""",
    "XOR of two events": """Random: 32 features, two events, each up or down in a frame of its own. The label is
        whether they differ; no weighted sum of the features determines it. No encoder.""",
}


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), 120)


def _values(figures: Sequence[Figures], name: str) -> list[float]:
    return [of_seed[name] for of_seed in figures]


def _aim(what: str, values: Sequence[float], least: float, form: str) -> str:
    """It is reached when the mean is at least `least`; whether the spread leaves that open is said, too."""
    above = statistics.mean(values) - least
    verdict = "reached" if above >= 0 else "missed"
    if len(values) > 1 and abs(above) < statistics.stdev(values):
        verdict += ", within the spread"
    return f"| {what} | {spread(values, form)} | {verdict} |"


if __name__ == "__main__":
    sys.exit(main())
