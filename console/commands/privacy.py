"""nightsplit privacy: the site's ledger, a line per run, and what all of them have spent together."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightsplit.console.ui.text import columns, counted, screen
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.errors import ConfigError
from nightsplit.site_worker.config import SiteSection
from nightsplit.site_worker.policy import read_policy
from nightsplit.site_worker.privacy import check_installed

if TYPE_CHECKING:
    from nightsplit.site_worker.privacy.ledger import Total

ALL = "all runs"
FIGURES = {
    "records": "records", "rate": "rate", "sigma": "sigma", "steps": "steps", "delta": "delta", "epsilon": "epsilon",
    "epsilon RDP": "epsilon_rdp", "patient's records": "patient_records", "patient": "patient_epsilon",
}  # fmt: skip


def show_privacy(file: WorkerFile, as_json: bool) -> None:
    """Print what was spent on the records of a site.

    Raises:
        ConfigError: 103 the file is not a site's.
        RunError: 612 the ledger cannot be used, 614 packages are missing.
    """
    summary = summarise(file)
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


def summarise(file: WorkerFile) -> dict[str, Any]:
    """The ledger as plain data; epsilons are of a record unless they are a patient's.

    Raises:
        ConfigError, RunError: see `show_privacy`.
    """
    if not isinstance(file.worker, SiteSection):
        raise ConfigError(103, f"{file.path}: the ledger is a site's.", "name a site.toml.")
    policy, path = file.base / file.worker.policy, file.base / file.worker.ledger
    most = read_policy(policy).max_epsilon
    return {"site": file.worker.name, "ledger": str(path), "max_epsilon": most, **_read(path)}


def _read(path: Path) -> dict[str, Any]:
    check_installed()
    from nightsplit.site_worker.privacy.ledger import Ledger

    if not path.exists() and not path.with_suffix(".key").exists():
        return {"runs": [], "total": None}
    with closing(Ledger(path)) as ledger:
        runs = [
            {
                "run": entry.run, "records": entry.records, "rate": entry.use.rate, "sigma": entry.use.sigma,
                "steps": entry.use.steps, **_spent(ledger.total(entry.run)), "delta": entry.delta,
            }
            for entry in ledger.entries()
        ]  # fmt: skip
        return {"runs": runs, "total": {"run": ALL, **_spent(ledger.total())}}


def _spent(total: Total) -> dict[str, Any]:
    return {
        "delta": total.delta, "epsilon": total.record.pld, "epsilon_rdp": total.record.rdp,
        "patient_records": total.patient_records, "patient_epsilon": total.patient,
    }  # fmt: skip


def _short(figure: float | None) -> str:
    return "" if figure is None else str(figure) if isinstance(figure, int) else f"{figure:.3g}"
