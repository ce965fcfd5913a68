"""Cost of secret first weights: the same runs with the public seed of run.toml and with secrets of the sites.

    python -m benchmarks.accuracy.secret_weights --example cholesterol --seeds 8

With a secret a site draws order, dropout, augmentation and the first weights of its own layers so that no server can
repeat its steps; layers of several sites then begin differently. Differences are paired by seed: secret minus public.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from msgspec.structs import replace

from benchmarks.speed.common import scratch
from nightsplit.console.demo.demo import EXAMPLES, TABLE_METRICS, _copy_example
from nightsplit.shared.config.load import load
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.simulation.run import Simulation
from nightsplit.site_worker.config import SiteConfig
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.data.scaling import scale
from nightsplit.site_worker.data.source import read_splits


def play(config: RunConfig, splits: dict[str, Splits], work: Path, secret: bool) -> dict[str, float]:
    """Play a run, and return the first figure of its table by site, and over all."""
    with TemporaryDirectory() as folder:
        simulation = Simulation(config, splits, Path(folder), work)
        if secret:
            key = f"{config.run.seed}"
            simulation.seeds = {site: hashlib.sha256(f"{key} {site}".encode()).digest() for site in splits}
        figures = simulation.run().evaluate()
    name = TABLE_METRICS[config.task.kind][0]
    return {site: metrics[name] or 0.0 for site, metrics in figures.sites.items()} | {
        "all": figures.overall[name] or 0.0
    }


def interval(differences: Sequence[float]) -> str:
    """Mean with twice its standard error."""
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.4f} ± {2 * error:.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", default="cholesterol", metavar="NAME")
    parser.add_argument("--window", type=int, default=0, metavar="W", help="in place of the example's")
    parser.add_argument("--seeds", type=int, default=8, metavar="N")
    chosen = parser.parse_args(arguments)
    prepare_torch(1, "cpu")
    with scratch() as folder, chdir(folder):
        work = _copy_example(EXAMPLES / chosen.example, "secrets").absolute()
        config = load_run(work / "run.toml")
        config = replace(config, run=replace(config.run, window=chosen.window or config.run.window))
        results: list[tuple[dict[str, float], dict[str, float]]] = []
        for seed in range(chosen.seeds):
            run = replace(config, run=replace(config.run, seed=seed))
            sources = {site: load(work / f"{site}.toml", SiteConfig).data for site in run.run.sites}
            splits = {site: scale(read_splits(source, run, work), run.data) for site, source in sources.items()}
            results.append((play(run, splits, work, secret=False), play(run, splits, work, secret=True)))
            print(
                f"seed {seed}: "
                + "  ".join(
                    f"{k} {p:.3f} {s:.3f}"
                    for (k, p), s in zip(results[-1][0].items(), results[-1][1].values(), strict=True)
                ),
                file=sys.stderr,
                flush=True,
            )
    print(f"{chosen.example}, window {config.run.window}, {chosen.seeds} seeds: public; secret minus public")
    for name in results[0][0]:
        public = [before[name] for before, _ in results]
        print(f"  {name:<12} {statistics.mean(public):.4f}   {interval([s[name] - p[name] for p, s in results])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
