"""Statuses that somebody falsified, and what a worker's own status may say: real commands and real workers."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.run_store.base import Status
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.run_store.status import UNREADABLE, Phase, WorkerStatus
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.shared.wire.message import SERVER
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.foreign_status import FOREIGN, write_row
from tests.harness.services import free_port, wait_until
from tests.harness.study import change, write_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Its run is open."""
    folder = write_study(tmp_path / "study")
    ServerWorker(folder / "server.toml").open_run()
    return folder


def status_of(folder: Path, worker: str) -> Status | None:
    with closing(open_store("sqlite:run.db", "ward", folder)) as store:
        return store.statuses([worker]).get(worker)


@contextmanager
def at_work(worker: ServerWorker | SiteWorker, stop: StopSignal) -> Iterator[None]:
    """Let a worker work on a thread of its own, until the block ends."""
    thread = threading.Thread(target=worker.work)
    thread.start()
    try:
        yield
    finally:
        stop.requested = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", FOREIGN)
def test_status_and_doctor_show_that_a_status_cannot_be_read(
    study: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for worker, file in (("north", "server.toml"), (SERVER, "north.toml")):
        write_row(study / "run.db", "ward", worker, FOREIGN[kind])
        capsys.readouterr()
        assert run(["status", str(study / file)]) == 0
        assert "UNREADABLE" in capsys.readouterr().out
        assert run(["status", str(study / file), "--json"]) == 0
        lines = {line["worker"]: line for line in json.loads(capsys.readouterr().out)["workers"]}
        assert (lines[worker]["state"], lines[worker]["sent"], lines[worker]["detail"]) == ("unreadable", None, None)
        assert run(["doctor", str(study / file), "--json"]) == 0
        found = {line["check"]: line for line in json.loads(capsys.readouterr().out)["checks"]}
        assert re.search(f"the status of .*{worker}.* cannot be read", found["run store"]["found"])
        assert found["run store"]["fix"]


@pytest.mark.campaign
@pytest.mark.timeout(200)
def test_a_server_speaks_and_judges_absence_whatever_a_site_wrote(tmp_path: Path) -> None:
    """The site that falsifies its status is missed as any other that is silent."""
    study = write_study(tmp_path)
    change(study / "run.toml", "[run]", "[run]\nquorum = 1\nabsence_hours = 0.001")
    stop = StopSignal()

    def told() -> WorkerStatus:
        status = status_of(study, SERVER)
        return status.report if status is not None else UNREADABLE

    with at_work(ServerWorker(study / "server.toml", stop=stop), stop):
        wait_until(lambda: told().phase is Phase.WORKING, 60, "the server to speak")
        for record in FOREIGN.values():
            write_row(study / "run.db", "ward", "north", record)
            moment = time.time()
            wait_until(lambda moment=moment: written(study) > moment + 1, 30, "the server to speak again")
            north = told().sites["north"]
            assert (north.queued, north.presence.last_seen) == (None, None)
        wait_until(lambda: "north" in told().lacking, 60, "north to be missed")


def written(folder: Path) -> float:
    """When the server's status was written last."""
    with closing(sqlite3.connect(folder / "run.db", timeout=30)) as rows:
        return float(rows.execute("SELECT written FROM status WHERE worker = 'server'").fetchone()[0])


def test_a_failing_worker_quotes_no_patient_in_the_store(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the code of a model says may be a row of the hospital's table, though the hospital approved it."""
    quote = f"raise ValueError(Path('{study}/patients.csv').read_text().splitlines()[1])"
    code = f"from pathlib import Path\ndef make(**settings):\n    {quote}\n".encode()
    (study / "model.py").write_bytes(code)
    named = f'"model.py:make"\ncode_sha256 = "{hashlib.sha256(code).hexdigest()}"'
    change(study / "run.toml", '"nightsplit.models:mlp"', named)
    table = (study / "patients.csv").read_text().splitlines()
    capsys.readouterr()
    assert run(["site", str(study / "north.toml")]) == 1
    assert table[1] in capsys.readouterr().err, "the code has quoted the table"
    status = status_of(study, "north")
    assert status is not None
    assert (status.report.phase, status.report.detail) == (Phase.FAILED, "E104 Model factory cannot be used")
    for file in study.glob("run.db*"):
        content = file.read_bytes()
        assert not [row for row in table if row.encode() in content]


def test_the_broker_that_is_away_is_named_at_the_site_and_not_in_the_store(study: Path) -> None:
    """An address that was read wrongly may show a part of the password."""
    port = free_port()
    change(study / "north.toml", "embedded:broker", f"amqp://north:geheim@127.0.0.1:{port}/ward")
    stop, shown = StopSignal(), []
    with at_work(SiteWorker(study / "north.toml", stop=stop, observe=shown.append), stop):

        def blocked() -> bool:
            status = status_of(study, "north")
            return status is not None and status.report.phase is Phase.BLOCKED

        wait_until(blocked, 60, "the site to be blocked")
        status = status_of(study, "north")
    assert status is not None
    assert status.report.detail == "E201 Broker cannot be reached"
    details = {seen.detail for seen in shown if seen.phase is Phase.BLOCKED}
    assert any(f"waiting for the broker: north@127.0.0.1:{port}" in str(detail) for detail in details)
