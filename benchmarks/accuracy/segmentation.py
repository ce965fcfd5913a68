"""Cost of differential privacy in Dice: hippocampus MRI at three sites, without it and at epsilon 8, 3 and 1.

    python -m benchmarks.accuracy.segmentation [--row NAME] [--seeds N]     train; about 20 minutes of one core per seed
    python -m benchmarks.accuracy.segmentation --write                      and put both into docs/reference
    python -m benchmarks.accuracy.segmentation --quick                      a few steps of each row: shows that it works

Slices of $NIGHTSPLIT_DATA, divided by volume: 20 volumes that belong to no site ("public"), and three sites of
80, of which 13 are for the test and 8 for validation. That division is the same for all seeds, so that settings
which were chosen on validation volumes have seen no test volume. While it trains, it tells validation figures alone.

Every row that is done is kept in the folder (--folder), and not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from msgspec.structs import replace as changed
from safetensors.torch import load_file, save_file

from benchmarks.accuracy.outlines import draw
from benchmarks.speed.private_step import trainers_of
from nightsplit.console.demo.baselines import alone, centralized
from nightsplit.shared.config.optimizer import OptimizerSection
from nightsplit.shared.config.run import (
    DataSection,
    ModelSection,
    PrivacySection,
    RoundSection,
    RunConfig,
    RunSection,
    TaskSection,
)
from nightsplit.shared.errors import NightsplitError
from nightsplit.shared.learning.metrics import measure
from nightsplit.shared.learning.optimizers import START
from nightsplit.shared.models.segmentation import unet
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.simulation.evaluate import ModelFigures, evaluate
from nightsplit.simulation.run import simulate
from nightsplit.site_worker.config import SourceSection
from nightsplit.site_worker.data.dataset import Dataset, Splits
from nightsplit.site_worker.data.source import read_splits
from nightsplit.site_worker.privacy.accounting import Use, epsilon_of, noise_for, patient_epsilon

SITES = ("north", "south", "east")
PUBLIC, VOLUMES = 20, 260
DELTA, CLIP = 1.9e-4, 1.0
DOCS = Path(__file__).parents[2] / "docs" / "reference"
BEGIN, END = "<!-- segmentation: written by benchmarks/accuracy/segmentation.py -->", "<!-- end of segmentation -->"


@dataclass(frozen=True)
class Schedule:
    """Training of a site, with a learning rate that falls to zero as a cosine."""

    rounds: int
    local_batches: int
    batch: int
    lr: float


PLAIN = Schedule(rounds=40, local_batches=12, batch=64, lr=1e-2)
PRIVATE = Schedule(rounds=30, local_batches=8, batch=128, lr=4e-3)
LONG = replace(PRIVATE, rounds=60)
POOLED = replace(PLAIN, local_batches=12 * len(SITES))
"""As many batches as the sites make together."""


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        name: in the table.
        trained: on what.
        epsilon: of a slice; None without noise.
        aim: Dice to reach.
    """

    name: str
    trained: Literal["public volumes", "pooled sites", "sites"]
    schedule: Schedule
    epsilon: float | None = None
    aim: float | None = None

    def config(self, seed: int) -> RunConfig:
        """As run.toml would say it."""
        schedule, private = self.schedule, self.epsilon is not None
        return RunConfig(
            run=RunSection(
                id="segmentation",
                protocol="fedavg_dp_seg" if private else "fedavg_transfer",
                sites=list(SITES),
                seed=seed,
                order="strict",
                batch_size=schedule.batch,
                evaluate_every=max(1, schedule.rounds // 5),
            ),
            model=ModelSection(factory="nightsplit.models:unet"),
            task=TaskSection(kind="segmentation"),
            optimizer=OptimizerSection(lr=schedule.lr),
            round=RoundSection(rounds=schedule.rounds, local_batches=schedule.local_batches, decay="cosine"),
            privacy=None if self.epsilon is None else PrivacySection(epsilon=self.epsilon, delta=DELTA, clip=CLIP),
            # No scaling by a site's own mean and spread: nothing would hide those.
            data=DataSection(image_size=64, scaling="none", validation=0.1, test=1 / 6),
        )


ROWS = {
    row.name: row
    for row in (
        Row("public volumes alone", "public volumes", PLAIN),
        Row("centralized", "pooled sites", POOLED),
        Row("FedAvg", "sites", PLAIN, aim=0.83),
        Row("DP, epsilon 8", "sites", PRIVATE, 8.0, aim=0.78),
        Row("DP, epsilon 8, twice the steps", "sites", LONG, 8.0, aim=0.78),
        Row("DP, epsilon 3", "sites", PRIVATE, 3.0, aim=0.75),
        Row("DP, epsilon 1", "sites", PRIVATE, 1.0, aim=0.70),
    )
}
DRAWN = ("FedAvg", "DP, epsilon 8")


@dataclass(frozen=True)
class Privacy:
    """Privacy that a site's slices lose.

    Attributes:
        records: the site's training slices.
        sigma: noise, in units of the clipping norm.
        pld, rdp: epsilon of a slice, by privacy loss distributions and by Rényi DP.
        most: slices of its largest training volume.
        patient: epsilon of that patient, by the group arithmetic.
    """

    records: int
    sigma: float
    pld: float
    rdp: float
    most: int
    patient: float


@dataclass(frozen=True)
class Result:
    """A row that was trained.

    Attributes:
        validation: Dice of the validation volumes; None where none were asked.
        test: Dice of all test volumes, each of which counts once.
        sites: of each site's.
        seconds: of processor time, one thread, all three sites and the evaluation at the end.
        privacy: by site, of a private row.
    """

    validation: float | None
    test: float
    sites: dict[str, float]
    seconds: float
    privacy: dict[str, Privacy]


# ── data ────────────────────────────────────────────────────────────────────────────────────────


def read_volumes() -> tuple[dict[str, Splits], Dataset]:
    """The sites' volumes, and the public ones.

    Raises:
        NightsplitError: the data set is not here.
    """
    config = next(iter(ROWS.values())).config(seed=0)
    edges = [(PUBLIC + (VOLUMES - PUBLIC) * i / len(SITES)) / VOLUMES for i in range(len(SITES) + 1)]

    def read(first: float, last: float, config: RunConfig) -> Splits:
        source = SourceSection(
            source="arrays",
            path="$NIGHTSPLIT_DATA/hippocampus_msd/hippocampus_2d.npz",
            masks="masks",
            patient="volume",
            share=(first, last),
        )
        return read_splits(source, config, Path())

    everything = changed(config, data=changed(config.data, validation=0.0, test=0.0))
    splits = {site: read(edges[i], edges[i + 1], config) for i, site in enumerate(SITES)}
    return splits, read(0.0, edges[0], everything).train


# ── training ────────────────────────────────────────────────────────────────────────────────────


def carry_out(row: Row, seed: int, splits: Mapping[str, Splits], public: Dataset) -> tuple[Result, dict[str, Any]]:
    """Train a row; its result, and the model's weights where sites trained together."""
    config = row.config(seed)
    began = time.process_time()
    if row.trained == "sites":
        simulation = simulate(config, splits)
        figures = simulation.evaluate()
        seconds = time.process_time() - began
        evaluation = simulation.server.evaluation
        validation = (evaluation.entry(evaluation.best) or {})["overall"]["validation"]["dice"]
        privacy = {} if row.epsilon is None else {site: spent(config, part.train) for site, part in splits.items()}
        return _result(figures, validation, seconds, privacy), dict(simulation.server.best_weights)
    if row.trained == "pooled sites":
        figures = centralized(config, splits)
    else:
        nobody = public.select([])
        lent = {site: Splits(public, nobody, part.test) for site, part in splits.items()}
        figures = alone(config, SITES[0], lent)
    return _result(figures, None, time.process_time() - began, {}), {}


def _result(figures: ModelFigures, validation: float | None, seconds: float, privacy: dict[str, Privacy]) -> Result:
    sites = {site: metrics["dice"] or 0.0 for site, metrics in figures.sites.items()}
    return Result(validation, figures.pooled["dice"] or 0.0, sites, seconds, privacy)


def spent(config: RunConfig, train: Dataset) -> Privacy:
    """Return the cost of a whole run for the training slices of a site; the noise is the one that the site computes."""
    assert config.privacy is not None
    delta = config.privacy.delta
    rate, steps = min(1.0, config.run.batch_size / len(train)), config.round.rounds * (config.round.local_batches or 0)
    use = Use(rate, noise_for(config.privacy.epsilon, delta, rate, steps), steps)
    epsilon, most = epsilon_of([use], delta), max(Counter(train.patients).values())
    return Privacy(len(train), use.sigma, epsilon.pld, epsilon.rdp, most, patient_epsilon([(use, most)], delta))


def mean_mask(splits: Mapping[str, Splits]) -> ModelFigures:
    """The same mask for every slice: where the sites' training masks overlap often enough.

    How often that is, is chosen on validation volumes.
    """
    config = ROWS["FedAvg"].config(seed=0)
    often = torch.cat([part.train.targets for part in splits.values()]).mean(0)

    def logits(count: int, threshold: float) -> torch.Tensor:
        return (often - threshold).expand(count, 1, *often.shape)

    def on_validation(threshold: float) -> float:
        held_out = [part.validation for part in splits.values()]
        dice = [
            measure(config.task, config.data, logits(len(part), threshold), part.targets, part.patients)["dice"]
            for part in held_out
        ]
        return statistics.mean(value or 0.0 for value in dice)

    best = max((step / 40 for step in range(1, 24)), key=on_validation)
    return evaluate(config, splits, lambda site, inputs: logits(len(inputs), best))


def step_ratio(steps: int, batch: int) -> str:
    """Measure the cost of a private step over a plain one that follows it, in processor time."""
    trainers = trainers_of(unet, batch)
    images, masks = torch.rand(batch, 1, 64, 64), (torch.rand(batch, 64, 64) < 0.1).float()
    taken: list[tuple[float, float]] = []
    for step in range(steps + 1):
        at = [time.process_time()]
        for name in ("", "plain"):  # "" is the private one
            trainers[name].step(images, masks, step, START)
            at.append(time.process_time())
        taken.append((at[1] - at[0], at[2] - at[1]))
    del taken[0]  # the first step of each prepares
    ratio, plain_ms = statistics.median(a / b for a, b in taken), 1e3 * statistics.median(b for _, b in taken)
    told = f"A private step of the U-Net takes {ratio:.2f} times a plain one ({plain_ms:.0f} ms of processor time)"
    return f"{told}, batch {batch}, medians of {steps}."


class Shelf:
    """Rows that are done, in a folder: figures, and weights where there are some."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, row: Row, seed: int, suffix: str) -> Path:
        # Other settings are another row: the contract has them all.
        name = row.name.replace(", ", "-").replace(" ", "-").lower()
        return self._folder / f"{name}-{row.config(seed).digest[:8]}{suffix}"

    def get(self, row: Row, seed: int) -> Result | None:
        """Return the results of a row."""
        path = self._path(row, seed, ".json")
        if not path.exists():
            return None
        known = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{**known, "privacy": {site: Privacy(**spent) for site, spent in known["privacy"].items()}})

    def put(self, row: Row, seed: int, result: Result, weights: dict[str, torch.Tensor]) -> None:
        """Keep a row. The figures come last: a row without them is not done."""
        save_file(weights, self._path(row, seed, ".safetensors"))
        self._path(row, seed, ".json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")

    def weights(self, row: Row, seed: int) -> dict[str, torch.Tensor]:
        """Return the models of a row that sites trained together."""
        return load_file(self._path(row, seed, ".safetensors"))


# ── table ───────────────────────────────────────────────────────────────────────────────────────


def table(constant: ModelFigures, done: Mapping[Row, Sequence[Result]], ratio: str) -> str:
    """Return the tables of the results page: means over seeds; of privacy, those of the site that loses most."""
    lines = [
        f"| trained | Dice | {' | '.join(SITES)} | aim | steps | s |",
        f"| --- |{' ---: |' * (len(SITES) + 4)}",
        "| constant mean mask | "
        + " | ".join(f"{dice['dice']:.3f}" for dice in (constant.pooled, *(constant.sites[site] for site in SITES)))
        + " | | | |",
    ]
    for row, results in done.items():
        test = [result.test for result in results]
        deviation = f" ± {statistics.stdev(test):.3f}" if len(test) > 1 else ""
        cells = [f"{statistics.mean(test):.3f}{deviation}"]
        cells += [f"{statistics.mean(result.sites[site] for result in results):.3f}" for site in SITES]
        cells += [f"{row.aim:.2f}" if row.aim else "", str(row.schedule.rounds * row.schedule.local_batches)]
        cells += [f"{statistics.mean(result.seconds for result in results):.0f}"]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    columns = [
        "of a site",
        "sigma",
        "slices",
        "epsilon of a slice",
        "by RDP",
        "slices of a patient",
        "epsilon of a patient",
    ]
    lines += ["", f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for row, results in done.items():
        if lost := max(results[0].privacy.values(), key=lambda site: site.patient, default=None):
            figures = f"{lost.sigma:.2f} | {lost.records} | {lost.pld:.2f} | {lost.rdp:.2f} | {lost.most}"
            lines.append(f"| {row.name} | {figures} | {lost.patient:.0f} |")
    return "\n".join([*lines, "", ratio])


# ── the study ───────────────────────────────────────────────────────────────────────────────────


def hurried(row: Row) -> Row:
    """Two rounds of one small batch."""
    return replace(row, schedule=replace(row.schedule, rounds=2, local_batches=1, batch=8))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(ROWS), action="append", help="this row alone (may be repeated)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs/segmentation"), help="where rows are kept")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of results.md, for --write")
    parser.add_argument("--quick", action="store_true", help="two steps of each row")
    parser.add_argument("--write", action="store_true", help="put table and picture into the documentation")
    chosen = parser.parse_args(arguments)
    prepare_torch(1, "cpu")
    rows = [hurried(ROWS[name]) if chosen.quick else ROWS[name] for name in chosen.row or ROWS]
    shelf = Shelf(chosen.folder)
    done: dict[Row, list[Result]] = {row: [] for row in rows}
    try:
        splits, public = read_volumes()
        for row, seed in ((row, seed) for seed in range(1, chosen.seeds + 1) for row in rows):
            result = shelf.get(row, seed)
            if result is None:
                result, weights = carry_out(row, seed, splits, public)
                shelf.put(row, seed, result, weights)
            told = "" if result.validation is None else f"Dice {result.validation:.3f} on validation volumes, "
            print(f"{row.name}, seed {seed}: {told}{result.seconds:.0f} s", file=sys.stderr, flush=True)
            done[row].append(result)
    except NightsplitError as error:
        print(error, file=sys.stderr)
        return 1
    text = table(mean_mask(splits), done, step_ratio(*((2, 8) if chosen.quick else (15, 128))))
    print(text)
    if chosen.write:
        drawn = [row for row in rows if row.name in DRAWN]
        models = {row.name: (row.config(seed=1), shelf.weights(row, seed=1)) for row in drawn}
        draw(splits, models, chosen.docs / "segmentation.png")
        page = chosen.docs / "results.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
