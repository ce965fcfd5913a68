"""Report of a run: report.json for machines, report.md and curves.png for people, and the trained weights."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nightsplit.server_worker.protocols import AnyServer
from nightsplit.shared.config.run import RunConfig
from nightsplit.shared.foreign import in_markdown
from nightsplit.shared.learning.bounds import OUTLIER
from nightsplit.shared.learning.metrics import HEADLINE
from nightsplit.shared.models.hashing import weights_sha256
from nightsplit.shared.protocols.spec import spec_of
from nightsplit.shared.storage.files import write_atomic
from nightsplit.shared.storage.tensors import as_safetensors


def write_report(
    folder: Path, config: RunConfig, role: AnyServer, last_seen: Mapping[str, datetime | None]
) -> dict[str, Any]:
    """Write the report folder of a finished run; return the content of report.json.

    `last_seen` is the time at which each site was last present, in UTC; None for never.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = summarise(config, role, last_seen)
    write_atomic(folder / f"{spec_of(config).names.weights}.safetensors", as_safetensors(role.best_weights))
    role.publish(folder)
    write_atomic(folder / "report.json", (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())
    write_atomic(folder / "report.md", _markdown(config, report).encode())
    if report["history"]:
        _draw(folder / "curves.png", config, report["history"])
    return report


def summarise(config: RunConfig, role: AnyServer, last_seen: Mapping[str, datetime | None]) -> dict[str, Any]:
    """Return the content of the report as plain data; arguments as of `write_report`."""
    sites: dict[str, dict[str, Any]] = {
        site: {
            **role.contribution(site),
            "last_seen": time.isoformat() if (time := last_seen[site]) else None,
            "messages": role.applied[site],
            "planned": sequence.last if (sequence := role.sequences.get(site)) else None,
            "training_samples": sequence.train if sequence else None,
            "refused": role.refusals[site],
            "outliers": dict(role.outliers[site]),
        }
        for site in config.run.sites
    }
    return {
        "run": config.run.id,
        "protocol": config.run.protocol,
        "digest": config.digest,
        **role.outcome(),
        "best_epoch": role.evaluation.best,
        "best": role.evaluation.entry(role.evaluation.best),
        "steps": role.steps,
        "sites": sites,
        "history": role.evaluation.history,
        f"{spec_of(config).names.weights}_sha256": weights_sha256(role.best_weights),
    }


def _markdown(config: RunConfig, report: Mapping[str, Any]) -> str:
    spec, sites = spec_of(config), report["sites"].items()
    blocks = [
        [f"# Run {report['run']}"],
        [f"{spec.name}, {spec.settings(config)}, {report['steps']} {spec.names.steps}."],
        *([_exclusion(config, site, facts)] for site, facts in sites if facts["excluded_at"] is not None),
        *_evaluation(config, report),
        ["Contribution of each site. Share: of the training steps that were applied."],
        [
            "| site | batches | samples in them | share | messages applied | refused | outliers | last seen (UTC) | |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
            *(_contribution(site, facts) for site, facts in sites),
        ],
        *([_outliers(site, facts)] for site, facts in sites if facts["outliers"]),
        [f"sha256 of {spec.names.share}: `{report[f'{spec.names.weights}_sha256']}`"],
    ]
    return "\n".join(line for block in blocks for line in [*block, ""])


def _evaluation(config: RunConfig, report: Mapping[str, Any]) -> list[list[str]]:
    """Return the blocks about the best model, its figures and the curves; none without an evaluation."""
    best = report["best"]
    if best is None:
        return []
    heading = f"Best scale: {report['scale']:g}" if "scale" in report else f"Best epoch: {best['epoch']}"
    figures = [name for name in best["overall"]["test"] if name != "samples"]
    table = [
        f"| held-out test patients of | samples | {' | '.join(map(in_markdown, figures))} |",
        f"| --- | ---: |{' ---: |' * len(figures)}",
    ]
    for site, metrics in [*best["sites"].items(), ("all sites (mean by samples)", best["overall"])]:
        test = metrics.get("test", {})
        cells = " | ".join("-" if (value := test.get(name)) is None else f"{value:.4f}" for name in figures)
        table.append(f"| {site} | {int(test.get('samples') or 0)} | {cells} |")
    chosen = f"chosen by the {HEADLINE[config.task.kind]} of validation patients, independent of test patients"
    choice = chosen if config.data.validation else "the last one, since there are no validation patients"
    return [[f"{heading}, {choice}."], table, ["![curves](curves.png)"]]


def _contribution(site: str, facts: Mapping[str, Any]) -> str:
    planned = "unknown" if facts["planned"] is None else facts["planned"]
    excluded = "" if facts["excluded_at"] is None else f"**EXCLUDED** after {facts['excluded_at']} messages"
    return (
        f"| {site} | {facts['batches']} | {facts['samples']} | {100 * facts['share']:.1f} % "
        f"| {facts['messages']} of {planned} | {facts['refused']} | {sum(facts['outliers'].values())} "
        f"| {facts['last_seen'] or 'never'} | {excluded} |"
    )


def _outliers(site: str, facts: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{part} {count} times" for part, count in sorted(facts["outliers"].items()))
    return (
        f"{site} sent outliers: {parts}. Each was more than {OUTLIER:g} times as large as is usual among the sites, "
        "and was scaled down to that, or left out. A few are normal; a site with many has other data, a fault, or bad "
        "intent."
    )


def _exclusion(config: RunConfig, site: str, facts: Mapping[str, Any]) -> str:
    return (
        f"**EXCLUDED: {site}, after {facts['excluded_at']} applied messages of all sites, since it was silent for "
        f"{config.run.absence_hours:g} h and {config.run.quorum} sites suffice. Last seen: "
        f"{facts['last_seen'] or 'never'}. It gave {facts['batches']} batches, {100 * facts['share']:.1f} % of the "
        "training steps; later epochs were evaluated without its patients.**"
    )


def _draw(path: Path, config: RunConfig, history: list[Mapping[str, Any]]) -> None:
    """Draw loss and headline figure over epochs, for every site and overall, on held-out patients."""
    from matplotlib.figure import Figure  # slow to import, and needed only at the end of a run

    part = "validation" if config.data.validation else "test"
    names = ("loss", HEADLINE[config.task.kind])
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, len(names))
    epochs = [(entry["epoch"], {**entry["sites"], "overall": entry["overall"]}) for entry in history]
    for axis, name in zip(axes, names, strict=True):
        for site in [*config.run.sites, "overall"]:
            values = [(epoch, metrics.get(site, {}).get(part, {}).get(name)) for epoch, metrics in epochs]
            points = [(epoch, value) for epoch, value in values if value is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=site, linewidth=2 if site == "overall" else 1)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"{name} ({part})")
    if axes[-1].lines:
        axes[-1].legend()
    write_atomic(path, lambda draft: figure.savefig(draft, dpi=110, format="png"))
