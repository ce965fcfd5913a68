"""Approvals of the hospitals of a run, given by the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nightsplit.shared.protocols.load import load_run
from nightsplit.site_worker.trust.approval import approve


def approve_all(folder: Path, overrides: Sequence[str] = ()) -> None:
    """Approve the run of a folder as it is now, for every site that has a file there."""
    for site in load_run(folder / "run.toml", overrides).run.sites:
        if (folder / f"{site}.toml").exists():
            approve(folder / f"{site}.toml", "tests", overrides)
