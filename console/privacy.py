"""The site's ledger, a line per run, and what all of them have spent together."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.errors import ConfigError
from nightsplit.site_worker.config import SiteSection
from nightsplit.site_worker.policy import read_policy
from nightsplit.site_worker.privacy import check_installed

if TYPE_CHECKING:
    from nightsplit.site_worker.privacy.ledger import Total

ALL = "all runs"


def summarise(file: WorkerFile) -> dict[str, Any]:
    """The ledger as plain data; epsilons are of a record unless they are a patient's.

    Raises:
        ConfigError: 103 the file is not a site's.
        RunError: 612 the ledger cannot be used, 614 packages are missing.
    """
    if not isinstance(file.config, SiteSection):
        raise ConfigError(103, f"{file.path}: the ledger is a site's.", "name a site.toml.")
    policy, path = file.base / file.config.policy, file.base / file.config.ledger
    most = read_policy(policy).max_epsilon
    return {"site": file.config.name, "ledger": str(path), "max_epsilon": most, **_read(path)}


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
