"""The case studies of `benchmarks.accuracy.results`: data sets, their division, systems, and figures.

Every split system runs its real roles and engines (`nightsplit.simulation.run`), in strict order. The
hospitals' policies are not asked: all data are public, and on this machine.
"""

from __future__ import annotations

import runpy
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from msgspec.structs import replace

from nightsplit.console.demo.baselines import alone, centralized
from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.learning.metrics import Metrics
from nightsplit.shared.protocols.load import load_run
from nightsplit.simulation.evaluate import ModelFigures
from nightsplit.simulation.run import simulate
from nightsplit.site_worker.config import SiteConfig, SourceSection
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits

EXAMPLES = Path(__file__).parents[2] / "examples"
AS_IS = "as in the example"
SITES = {"1 site": 1, "2 equal sites": 2, "4 equal sites": 4, "8 equal sites": 8}
RATIOS = {f"2 sites {ratio}:1": ratio for ratio in (1, 2, 4, 8)}
SWEPT = "split_labels, window 4"


@dataclass(frozen=True)
class Case:
    """A case study.

    Attributes:
        name: folder of the example.
        seeds: how many seeds, from 1; each gives another split of the patients, other weights, another order.
        figures: of `Metrics`, the first one leads.
        sweeps: whether the number of sites and their imbalance are varied; needs data in one file.
        subset: part of each site's patients that is used.
    """

    name: str
    seeds: int
    figures: tuple[str, ...] = ("auc",)
    sweeps: bool = False
    subset: float = 1.0


CASES = {
    case.name: case
    for case in (
        Case("lung_ct", seeds=3, sweeps=True),
        Case("radiograph", seeds=3, subset=0.4),
        Case("heart", seeds=5),
        Case("cholesterol", seeds=5, figures=("r2", "mae"), sweeps=True),
    )
}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        case: name of the case.
        seed: of the run.
        division: `AS_IS`, a key of `SITES` or of `RATIOS`.
        system: a key of `systems`.
        hurry: a fifth of the epochs.
    """

    case: str
    seed: int
    division: str
    system: str
    hurry: bool


def sites_of(case: Case) -> list[str]:
    """The example's sites."""
    return _config(case.name).run.sites


def jobs(case: Case, seeds: int, hurry: bool) -> list[Job]:
    """All trainings of a case."""
    swept = [*SITES, *RATIOS] if case.sweeps else []
    pairs = [(AS_IS, system) for system in systems(sites_of(case))] + [(division, SWEPT) for division in swept]
    return [Job(case.name, seed, division, system, hurry) for seed in range(1, seeds + 1) for division, system in pairs]


System = Callable[[RunConfig, Mapping[str, Splits]], ModelFigures]


def systems(sites: list[str]) -> dict[str, System]:
    """Ways to train, by name."""
    return {
        "centralized": centralized,
        **{f"{site} alone": partial(_alone, site) for site in sites},
        "split_labels, window 1": partial(train_split, "split_labels", 1),
        SWEPT: partial(train_split, "split_labels", 4),
        "split_labels, a night": partial(train_split, "split_labels", None),
        f"{SWEPT}, averaged": partial(train_split, "split_labels", 4, bottoms="averaged"),
        "split_u, window 1": partial(train_split, "split_u", 1),
        "split_u, window 4": partial(train_split, "split_u", 4),
        "split_frozen": partial(train_split, "split_frozen", 1),
    }


def carry_out(job: Job) -> dict[str, Metrics]:
    """Train once; figures on test patients by site, their mean by samples under "all", and "pooled"."""
    torch.set_num_threads(1)
    config, splits = prepared(job.case, job.seed, job.division)
    if job.hurry:
        epochs = max(1, config.run.epochs // 5)
        run = replace(config.run, epochs=epochs, evaluate_every=min(epochs, config.run.evaluate_every))
        config = replace(config, run=run)
    figures = systems(config.run.sites)[job.system](config, splits)
    return {**figures.sites, "all": figures.overall, "pooled": figures.pooled}


def _alone(site: str, config: RunConfig, splits: Mapping[str, Splits]) -> ModelFigures:
    return alone(config, site, splits)


def train_split(
    protocol: str,
    window: int | None,
    config: RunConfig,
    splits: Mapping[str, Splits],
    bottoms: Literal["independent", "averaged"] = "independent",
) -> ModelFigures:
    """Train split; window None is a whole night, one epoch of the largest site."""
    night = max(1, *(len(part.train) // config.run.batch_size for part in splits.values()))
    run = replace(
        config.run,
        protocol=protocol,
        window=window or night,
        order="strict",
        bottoms=bottoms,
        average_every=4,
    )
    return simulate(replace(config, run=run), splits).evaluate()


@lru_cache(maxsize=2)
def prepared(name: str, seed: int, division: str) -> tuple[RunConfig, dict[str, Splits]]:
    """A case's configuration and scaled data with a seed and a division."""
    config, case = _config(name), CASES[name]
    sources = _sources(case, division)
    config = replace(config, run=replace(config.run, seed=seed, sites=list(sources)))
    folder = folder_of(name)
    return config, {site: scale(read_splits(source, config, folder), config.data) for site, source in sources.items()}


def _sources(case: Case, division: str) -> dict[str, SourceSection]:
    """Return the source of each site's data."""
    folder = folder_of(case.name)
    if division == AS_IS:
        sources = {site: load(folder / f"{site}.toml", SiteConfig).data for site in sites_of(case)}
        return {
            site: replace(source, share=(source.share[0] * case.subset, source.share[1] * case.subset))
            for site, source in sources.items()
        }
    whole = load(folder / f"{sites_of(case)[0]}.toml", SiteConfig).data
    if (folder / "all.csv").exists():
        whole = replace(whole, path="all.csv")
    if division in SITES:
        count = SITES[division]
        return {f"site{n}": replace(whole, share=(n / count, (n + 1) / count)) for n in range(count)}
    edge = RATIOS[division] / (RATIOS[division] + 1)
    return {"large": replace(whole, share=(0.0, edge)), "small": replace(whole, share=(edge, 1.0))}


@cache
def _config(name: str) -> RunConfig:
    return load_run(EXAMPLES / name / "run.toml")


_SCRATCH = tempfile.TemporaryDirectory(prefix="nightsplit-study-")


@cache
def folder_of(name: str) -> Path:
    """The example, or a copy of it with the data that it writes itself, also as one table "all.csv"."""
    folder = EXAMPLES / name
    if not (folder / "prepare.py").exists():
        return folder
    copy = Path(shutil.copytree(folder, Path(_SCRATCH.name) / name))
    runpy.run_path(str(copy / "prepare.py"), run_name="__main__")
    tables = [path.read_text(encoding="utf-8").splitlines(keepends=True) for path in sorted(copy.glob("*.csv"))]
    (copy / "all.csv").write_text("".join([tables[0][0], *(row for table in tables for row in table[1:])]))
    return copy
