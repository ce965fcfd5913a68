"""Cost of an encrypted query by the length of its sequences: a picture and a table for docs/reference/results.md.

    python -m benchmarks.speed.encrypted_lengths [--write]

Judges of 16 units on 32 features, as they are made; their weights do not matter here. Seconds are those of
benchmarks/speed/encrypted.py; each setting has a process of its own, whose second query is counted.
"""

from __future__ import annotations

import argparse
import resource
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

from benchmarks.accuracy.results import PAGE, write_section
from benchmarks.speed.common import MiB, Worker, resident_bytes
from benchmarks.speed.encrypted import FEATURES, HIDDEN, Setting
from nightsplit.shared.models.sequences import SequenceClassifier
from nightsplit.shared.runtime.process import prepare_torch

matplotlib.use("Agg")
from matplotlib import pyplot

LENGTHS = (1, 2, 3, 5, 8, 14)
SETTINGS = {
    "refresh, slots": (True, "slots"),
    "refresh, batch": (True, "batch"),
    "one_shot, batch": (False, "batch"),
}
BEGIN = "<!-- figures: written by benchmarks/speed/encrypted_lengths.py -->"
PICTURE = PAGE.parent / "encrypted.png"


class Cost(NamedTuple):
    """Costs of one full query.

    Attributes:
        sequences: in it.
        seconds: of the server.
        up, down: MB of ciphertexts to the server, and back.
        refresh: MB down and up between two frames; 0 where there is none.
        keys: MB of public keys.
        memory: MB that both parts added to the process at most.
        error, mean_error: of a logit, the largest and the mean of absolute ones.
    """

    sequences: int
    seconds: float
    up: float
    down: float
    refresh: float
    keys: float
    memory: float
    error: float
    mean_error: float


def measure(line: Connection, frames: int, recurrent: bool, packing: str) -> None:
    """Says the `Cost`."""
    prepare_torch(1, "cpu")
    torch.manual_seed(frames)
    before = resident_bytes()
    classifier = SequenceClassifier(frames, FEATURES, HIDDEN, recurrent).double()
    setting = Setting(classifier, packing)
    features = torch.tanh(torch.randn(setting.capacity, frames, FEATURES, dtype=torch.float64))
    for _ in range(2):
        found = setting.judged(features.numpy())
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        errors = np.abs(found - classifier(features)[:, 0].numpy())
    line.send(
        Cost(
            setting.capacity, setting.seconds, setting.up / 1e6, setting.down / 1e6, setting.refreshed / 1e6,
            len(setting.public.content) / 1e6, (peak - before) / MiB, errors.max(), errors.mean(),
        )
    )  # fmt: skip


def table(costs: dict[str, dict[int, Cost]]) -> list[str]:
    """Lines of Markdown."""
    columns = ["setting", "frames", "sequences", "s", "ms a sequence", "MB in", "MB out", "MB a refresh", "MB of keys"]
    lines = [f"| {' | '.join([*columns, 'MB of memory', 'largest error', 'mean error'])} |"]
    lines.append("| --- " + "| ---: " * 11 + "|")
    for name, by_length in costs.items():
        for frames, cost in by_length.items():
            lines.append(
                f"| {name} | {frames} | {cost.sequences} | {cost.seconds:.2f} "
                f"| {1000 * cost.seconds / cost.sequences:.2f} | {cost.up:.1f} | {cost.down:.2f} | {cost.refresh:.1f} "
                f"| {cost.keys:.2f} | {cost.memory:.0f} | {cost.error:.0e} | {cost.mean_error:.0e} |"
            )
    return lines


def draw(costs: dict[str, dict[int, Cost]], path: Path) -> None:
    """Seconds of a query, and of a sequence, by length."""
    figure, (whole, each) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, by_length in costs.items():
        (sequences,) = {cost.sequences for cost in by_length.values()}
        seconds = [cost.seconds for cost in by_length.values()]
        whole.plot(list(by_length), seconds, "o-", label=f"{name} ({sequences} sequences)")
        each.plot(list(by_length), [1000 * s / sequences for s in seconds], "o-")
    for axes, label in ((whole, "seconds of a query"), (each, "milliseconds of a sequence")):
        axes.set(xlabel="frames", ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    whole.legend()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description="What encrypted queries cost, by the length of sequences.")
    parser.add_argument("--write", action="store_true", help="put table and picture into docs/reference")
    chosen = parser.parse_args()
    costs: dict[str, dict[int, Cost]] = {}
    for name, (recurrent, packing) in SETTINGS.items():
        for frames in LENGTHS:
            with Worker(measure, frames, recurrent, packing) as worker:
                costs.setdefault(name, {})[frames] = worker.hear()
    text = "\n".join([
        "### Sequences: what a query costs",
        "",
        "`python -m benchmarks.speed.encrypted_lengths --write`: full queries of 32 features and 16 units, one core of",
        "the server; memory is what both parts added to one process.",
        "",
        "![Seconds of a query and milliseconds of a sequence, by frames](encrypted.png)",
        "",
        *table(costs),
        "",
    ])  # fmt: skip
    print(text)
    if chosen.write:
        draw(costs, PICTURE)
        write_section(BEGIN, text)


if __name__ == "__main__":
    main()
