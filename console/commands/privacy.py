"""nightsplit privacy: the privacy that runs have spent at a site, a line for each run and one for all."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightsplit.console.options import AsJson, Overrides, SiteFile
from nightsplit.shared.errors import ConfigError

if TYPE_CHECKING:
    from nightsplit.site_worker.privacy.ledger import Total

FIGURES = {
    "records": "records", "rate": "rate", "sigma": "sigma", "steps": "steps", "delta": "delta", "epsilon": "epsilon",
    "epsilon RDP": "epsilon_rdp", "patient's records": "patient_records", "patient": "patient_epsilon",
}  # fmt: skip


def privacy(file: SiteFile, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Show the privacy that runs have spent at a site.

    Show the site's ledger: for each run with differential privacy its noise, its steps, and the epsilon of a
    record and of the patient with the highest epsilon; and the total of all runs.
    """
    from nightsplit.console.ui.text import columns, counted, screen

    summary = _summarise(file, overrides)
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
    limit = summary["max_epsilon"]
    allowed = "policy.toml has no max_epsilon" if limit is None else f"policy.toml allows {limit:g}"
    console.print(
        f"{counted(len(summary['runs']), 'run')} spent epsilon {_short(summary['total']['epsilon'])} per record; "
        f"{allowed}. patient: the patient with the highest epsilon, all records together."
    )


def _short(figure: float | None) -> str:
    return "" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.3g}"


def _summarise(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the ledger as plain data; an epsilon is a record's unless its name says patient.

    Raises:
        ConfigError: 103 the file is not a site's, 118 and 119 its run is not approved.
        RunError: 612 the ledger cannot be used, 614 packages are missing.
    """
    from nightsplit.console.worker_file import WorkerFile
    from nightsplit.site_worker.config import SiteSection
    from nightsplit.site_worker.policy import read_policy
    from nightsplit.site_worker.privacy import check_installed
    from nightsplit.site_worker.trust.approval import Request

    file = WorkerFile(path, overrides)
    site = file.config
    if not isinstance(site, SiteSection):
        raise ConfigError(103, f"{path}: only a site has a ledger.", "name a site.toml.")
    Request(path, site, file.run_config).check()
    book, limit = file.base / site.ledger, read_policy(file.base / site.policy).max_epsilon
    summary: dict[str, Any] = {"site": site.name, "ledger": str(book), "max_epsilon": limit, "runs": [], "total": None}
    check_installed()
    if not book.exists() and not book.with_suffix(".key").exists():
        return summary
    from nightsplit.site_worker.privacy.ledger import Ledger

    with closing(Ledger(book)) as ledger:
        runs = [
            {
                "run": entry.run, "records": entry.records, "rate": entry.use.rate, "sigma": entry.use.sigma,
                "steps": entry.use.steps, **_spent(ledger.total(entry.run)), "delta": entry.delta,
            }
            for entry in ledger.entries()
        ]  # fmt: skip
        return summary | {"runs": runs, "total": {"run": "all runs", **_spent(ledger.total())}}


def _spent(total: "Total") -> dict[str, Any]:
    return {
        "delta": total.delta, "epsilon": total.record.pld, "epsilon_rdp": total.record.rdp,
        "patient_records": total.patient_records, "patient_epsilon": total.patient,
    }  # fmt: skip
