"""The demo: an example that is run twice on this computer, and its results.

    nights and days    the sites work by night and the server by day, and are online together only at the end
    killed             the same run in a new folder, with kill -9 of the server and of a site in the middle

The first run is compared with the usual ways to train: all patients in one place, and each site alone. In
strict order both runs end with the same weights, bit for bit; the demo compares their hashes. At a broker and
a run store of the user, the example is run once, under an id of its own.
"""

import hashlib
import json
import re
import runpy
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import nightsplit
from nightsplit.console.demo.baselines import alone, centralized
from nightsplit.console.demo.keys import give_keys, give_seeds
from nightsplit.console.demo.play import LocalRun, warm_up
from nightsplit.console.ui.text import columns, counted, screen
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.he import check_installed
from nightsplit.shared.learning.metrics import Metrics
from nightsplit.shared.protocols.load import load_run
from nightsplit.shared.protocols.spec import Shape, spec_of
from nightsplit.shared.runtime.process import prepare_torch
from nightsplit.shared.storage.files import make_private_folder
from nightsplit.shared.wire.message import SERVER
from nightsplit.shared.wire.schema import Reveals
from nightsplit.site_worker.data.dataset import Splits
from nightsplit.site_worker.trust.approval import approve
from nightsplit.site_worker.worker import SEED, SiteWorker

EXAMPLES = Path(nightsplit.__file__).parent / "examples"
_CLASSES = ("auc", "balanced_accuracy")
TABLE_METRICS = {"binary": _CLASSES, "multiclass": _CLASSES, "regression": ("r2", "mae"), "segmentation": ("dice",)}
"""Metrics in the table, by kind of task."""

Results = Mapping[str, Mapping[str, Metrics]]
"""Test metrics by model, and by site or "all"."""


def run_demo(folder: Path, as_json: bool, at: Sequence[str] | None = None) -> int:
    """Run an example and print its results.

    Args:
        folder: the example's folder, or its name.
        as_json: print only one JSON object with flat keys.
        at: addresses of a broker and a run store to use; None for the example's own.

    Returns:
        The exit code: 1 if a worker failed, which printed its error, or if the killed run had another result.

    Raises:
        ConfigError: 110 no such example; others as the workers'.
        DataError: the example's data is missing; the error says where to get it.
    """
    began = time.monotonic()
    warm_up()
    console = screen()
    console.quiet = as_json
    example = _find_example(folder)
    work = _copy_example(example, "demo")
    if at is not None:
        _use_services(work, *at)
    give_keys(work)
    give_seeds(work)
    config = load_run(work / "run.toml")
    _approve(work, config)
    splits = {site: SiteWorker(work / f"{site}.toml").load_splits() for site in config.run.sites}
    sizes = ", ".join(f"{site} {len(part.train)}" for site, part in splits.items())
    in_rounds = spec_of(config).shape is Shape.ROUND
    pace = counted(config.round.rounds, "round") if in_rounds else f"window {config.run.window}"
    heading = f"{example.name}: {config.run.protocol}, {pace}"
    console.print(heading, f"training samples: {sizes}", f"files: {work}", "", sep="\n")
    prepare_torch(1, "cpu")
    if not LocalRun(work, console).run_nights_and_days():
        return 1
    results = _results(config, splits, work)
    console.print()
    console.print(f"Test patients, {' / '.join(TABLE_METRICS[config.task.kind])}; all: mean weighted by samples")
    console.print(_table(config, results))
    repeated = _repeat(example, work, config, console, own_services=at is not None)
    if repeated is None:
        return 1
    queried = _query(work, config, console)
    if queried is None:
        return 1
    seconds = round(time.monotonic() - began, 1)
    console.print(f"report: {work / 'report' / 'report.md'} ({seconds:.0f} s in all)")
    if as_json:
        print(json.dumps({**_flat(config, results, work), **repeated, **queried, "seconds": seconds}))
    return 1 if repeated["sha256_equal"] is False else 0


def _repeat(
    example: Path, first: Path, config: RunConfig, console: Console, own_services: bool
) -> dict[str, Any] | None:
    """Run the example again with kills, if that can be compared; return facts, None if a worker failed."""
    if own_services or config.run.order != "strict":
        console.print()
        console.print(f"sha256 of {spec_of(config).names.share}: {_sha256(first, config)}")
        if not own_services:
            console.print("The order is fair: it depends on timing, so the same run again ends with other weights.")
        return {"kills": 0, "sha256_killed": None, "sha256_equal": None}
    work = _copy_example(example, "demo-killed")
    _copy_secrets(first, work, config)
    _approve(work, config)
    console.print()
    console.print(f"The same run once more, in {work}:")
    kills = LocalRun(work, console).run_with_kills(_report(first)["steps"])
    if kills is None:
        return None
    before, after = _hash_parts(first, config), _hash_parts(work, config)
    equal = compare_weights(before, after, kills, console, spec_of(config).names.share)
    return {"kills": kills, "sha256_killed": after[SERVER], "sha256_equal": equal}


def _query(work: Path, config: RunConfig, console: Console) -> dict[str, Any] | None:
    """Evaluate encrypted queries if the sites allow them: flat keys for JSON, or None if a worker failed."""
    if Reveals.CIPHERTEXT not in SiteWorker(work / f"{config.run.sites[0]}.toml").policy.allowed:
        return {}
    check_installed()
    from nightsplit.console.demo.play_queries import play_queries  # its library is an extra

    results = play_queries(work, config, console)
    if results is None:
        return None
    aucs = f"AUC {_cell(results.auc)}, in the clear {_cell(results.plain_auc)}"
    differences = f"logits differ by {results.difference:.1g} at most, decisions that differ: {results.decisions}"
    console.print(f"{counted(results.sequences, 'sequence')} evaluated: {aucs}; {differences}")
    return {f"encrypted_{name}": value for name, value in asdict(results).items()}


def compare_weights(
    before: Mapping[str, str], after: Mapping[str, str], kills: int, console: Console, share: str
) -> bool:
    """Print and return whether two runs of an example, as sha256 by worker, ended with the same weights.

    `kills` is the number of kills in the second run; `share` names the server's part of the model.
    """
    console.print()
    console.print(f"sha256 of {share}")
    console.print(f"  nights and days   {before[SERVER]}")
    console.print(f"  {counted(kills, 'kill'):<16}  {after[SERVER]}")
    different = [worker for worker in before if before[worker] != after[worker]]
    sites = ", ".join(worker for worker in before if worker != SERVER)
    if different:
        console.print(f"NOT EQUAL: the parts of {', '.join(different)} differ. This is a defect; please report it.")
    else:
        console.print(f"  bit-identical, as are the parts of {sites}")
    return not different


def _report(work: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((work / "report" / "report.json").read_text(encoding="utf-8"))
    return report


def _sha256(work: Path, config: RunConfig) -> str:
    """Return the sha256 of the server's part of the trained model."""
    return str(_report(work)[f"{spec_of(config).names.weights}_sha256"])


def _hash_parts(work: Path, config: RunConfig) -> dict[str, str]:
    """Return the sha256 of each worker's part of the trained model."""
    trained = {SERVER: _sha256(work, config)}
    for site in config.run.sites:
        digest = hashlib.sha256()
        for part in sorted(SiteWorker(work / f"{site}.toml").model_folder.glob("*.safetensors")):
            digest.update(part.name.encode() + part.read_bytes())
        trained[site] = digest.hexdigest()
    return trained


def _find_example(name: Path) -> Path:
    for place in (name, EXAMPLES / name, EXAMPLES / name.name):
        if (place / "run.toml").is_file():
            return place.resolve()
    known = ", ".join(sorted(path.parent.name for path in EXAMPLES.glob("*/run.toml")))
    raise ConfigError(110, f"{name} has no run.toml.", f"name a folder, or one of the examples: {known}.")


def _copy_example(example: Path, name: str) -> Path:
    """Copy the example's files into a new folder, and prepare its data."""
    stamp = time.strftime(f"{name}-%Y%m%d-%H%M%S-")
    home = Path("runs")
    try:
        home.mkdir(0o700, exist_ok=True)
        work = home / Path(tempfile.mkdtemp(prefix=stamp, dir=home)).name
    except OSError:  # not writable
        work = Path(tempfile.mkdtemp(prefix=stamp))
    for file in example.iterdir():
        if file.suffix in (".toml", ".py", ".safetensors"):
            shutil.copyfile(file, work / file.name)  # not its mode: an installed one may be read-only
    if (work / "prepare.py").exists():
        runpy.run_path(str(work / "prepare.py"), run_name="__main__")
    return work


def _approve(work: Path, config: RunConfig) -> None:
    """Approve the run for every site, as each hospital would."""
    for site in config.run.sites:
        approve(work / f"{site}.toml", "demo")


def _use_services(work: Path, broker: str, store: str) -> None:
    """Write the user's broker and run store into the files, and a new run id, since they may know this example."""
    for file in work.glob("*.toml"):
        text = file.read_text(encoding="utf-8")
        text = text.replace('"embedded:broker"', json.dumps(broker))
        text = text.replace('"sqlite:run.sqlite"', json.dumps(store))
        if file.name == "run.toml":
            own = rf'id = "\1-{work.name.removeprefix("demo-")}"'
            text = re.sub(r'^id = "(.+)"$', own, text, count=1, flags=re.MULTILINE)
        file.write_text(text, encoding="utf-8")


def _copy_secrets(first: Path, work: Path, config: RunConfig) -> None:
    """Copy the files with keys, the seeds, and the ledgers of a private run: the noise derives from their secrets."""
    for file in (*first.glob("*.toml"), *first.glob("*.identity")):
        shutil.copy(file, work)
    for site in config.run.sites:
        own = SiteWorker(first / f"{site}.toml").config
        make_private_folder(work / own.state)
        shutil.copy(first / own.state / SEED, work / own.state)
        if config.privacy is not None:
            ledger = Path(own.ledger)
            make_private_folder((work / ledger).parent)
            for file in (first / ledger).parent.glob(f"{ledger.stem}.*"):  # with SQLite's log and the key
                shutil.copy(file, (work / ledger).parent)


def _results(config: RunConfig, splits: Mapping[str, Splits], work: Path) -> Results:
    """Return the test metrics of the run, from its report, and of the baselines."""
    best = _report(work)["best"]
    site_metrics = {site: metrics["test"] for site, metrics in best["sites"].items()}
    results = {spec_of(config).names.heading: {**site_metrics, "all": best["overall"]["test"]}}
    baselines = {"centralized": centralized(config, splits, work)}
    baselines |= {f"{site} alone": alone(config, site, splits, work) for site in splits}
    return results | {name: {**figures.sites, "all": figures.overall} for name, figures in baselines.items()}


def _table(config: RunConfig, results: Results) -> Table:
    figures, groups = TABLE_METRICS[config.task.kind], [*config.run.sites, "all"]
    table = columns("trained", *groups, numbers=groups)
    for name, metrics in results.items():
        cells = (" / ".join(_cell(metrics[group][figure]) for figure in figures) for group in groups)
        table.add_row(name, *cells)
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _flat(config: RunConfig, results: Results, work: Path) -> dict[str, Any]:
    """Return all results under keys such as split_north_r2 and north_alone_all_mae."""
    report = _report(work)
    facts = {"run": report["run"], "best_epoch": report["best_epoch"], "sha256": _sha256(work, config)}
    return facts | {
        f"{name.replace(',', '').replace(' ', '_')}_{group}_{figure}": metrics[figure]
        for name, groups in results.items()
        for group, metrics in groups.items()
        for figure in TABLE_METRICS[config.task.kind]
    }
