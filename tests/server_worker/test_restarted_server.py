"""What a server that was killed had noted of the time: its successor, a real process, goes on with it."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.run_store.status import WorkerStatus
from nightsplit.shared.wire.message import SERVER
from tests.harness.approvals import approve_all
from tests.harness.workers import Hospital


@pytest.mark.campaign
@pytest.mark.timeout(200)
def test_silence_and_deadline_go_on(tmp_path: Path) -> None:
    """One of three sites never comes, and the deadline of the first round is far away."""
    hospital = Hospital(tmp_path / "lipids", protocol="fedavg_transfer", epochs=2, order="fair")
    run = hospital.folder / "run.toml"
    rule = 'close = "quorum"\nreports = 2\ndeadline_hours = 5.0'
    run.write_text(
        run.read_text()
        .replace("[run]", "[run]\nquorum = 2\nabsence_hours = 1.0")
        .replace("[round]", f"[round]\n{rule}")
    )
    approve_all(hospital.folder)

    def told(fence: int, silent: float) -> WorkerStatus:
        """What the server of this incarnation says, as soon as east has been silent for so long."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with closing(open_store("sqlite:run.db", "lipids", hospital.folder)) as store:
                status = store.statuses([SERVER]).get(SERVER)
            east = status.report.sites.get("east") if status is not None else None
            if east is not None and status.report.fence == fence and east.presence.silent_seconds >= silent:
                return status.report
            time.sleep(0.2)
        raise AssertionError(f"{status}: {hospital.logs()}")

    try:
        hospital.start(SERVER)
        first = told(1, silent=8.0)
        hospital.kill(SERVER)
        hospital.start(SERVER)
        second = told(2, silent=0.0)
        # A lease must run out first, in which nobody listened; then a look may be a second away.
        assert second.sites["east"].presence.silent_seconds >= 8.0
        assert second.round == first.round
    finally:
        hospital.close()
