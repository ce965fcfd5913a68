"""nightsplit privacy: a line per private run, and what all of them have spent together."""

import json

from nightsplit.console.options import AsJson, Overrides, SiteFile

FIGURES = {
    "records": "records", "rate": "rate", "sigma": "sigma", "steps": "steps", "delta": "delta", "epsilon": "epsilon",
    "epsilon RDP": "epsilon_rdp", "patient's records": "patient_records", "patient": "patient_epsilon",
}  # fmt: skip


def privacy(file: SiteFile, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Show what private runs have spent at a site.

    Show the site's ledger: for each run with differential privacy its noise, its steps and the epsilon of a
    record and of the patient who lost most; and what all runs spent together.
    """
    from nightsplit.console.privacy import summarise
    from nightsplit.console.ui.text import columns, counted, screen
    from nightsplit.console.worker_file import WorkerFile

    summary = summarise(WorkerFile(file, overrides))
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console = screen()
    if not summary["runs"]:
        console.print(f"{summary['ledger']}: no private run has begun at this site")
        return
    table = columns("run", *FIGURES, numbers=FIGURES)
    for line in [*summary["runs"], summary["total"]]:
        table.add_row(line["run"], *(_short(line.get(key)) for key in FIGURES.values()))
    console.print(table)
    most = summary["max_epsilon"]
    allowed = "policy.toml has no max_epsilon" if most is None else f"policy.toml allows {most:g}"
    console.print(
        f"{counted(len(summary['runs']), 'run')} spent epsilon {_short(summary['total']['epsilon'])} of a record; "
        f"{allowed}. patient: the one who lost most, with all of the records."
    )


def _short(figure: float | None) -> str:
    return "" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.3g}"
