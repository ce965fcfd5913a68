"""A site that is killed for good, and real workers that go on without it."""

import json
import time

import pytest

from nightsplit.shared.wire.message import SERVER
from tests.harness.approvals import approve_all
from tests.harness.workers import Hospital


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_real_workers_go_on_without_one_that_was_killed(tmp_path):
    """Some seconds stand for the hours; the server is killed, too, while it waits."""
    hospital = Hospital(tmp_path / "lipids", epochs=6)
    run = hospital.folder / "run.toml"
    run.write_text(run.read_text().replace("[run]", "[run]\nquorum = 2\nabsence_hours = 0.005"))
    approve_all(hospital.folder)

    def states():
        answer = hospital.call("status", "server.toml", "--json")
        return {line["worker"]: line for line in json.loads(answer.stdout)["workers"]}

    try:
        assert hospital.call("open", "server.toml").returncode == 0
        for site in ("north", "south", "east"):
            hospital.start(site)
        while not all(line["online"] for site, line in states().items() if site != SERVER):
            time.sleep(0.5)  # nobody may be absent because it is slow to start
        hospital.start(SERVER)
        hospital.wait_for_steps(10, seconds=120)
        hospital.kill("east")
        time.sleep(1)
        hospital.kill(SERVER)
        hospital.start(SERVER)
        del hospital.processes["east"]
        hospital.wait_for_end(seconds=200)
        east = hospital.call("site", "east.toml")
        line = states()["east"]
        words = hospital.call("status", "server.toml").stdout
    finally:
        hospital.close()
    report = json.loads((hospital.folder / "report" / "report.json").read_text())
    behind = report["sites"]["east"]["excluded_at"]
    assert 10 <= behind < report["sites"]["north"]["planned"]
    assert report["sites"]["east"]["batches"] > 0
    assert set(report["history"][-1]["sites"]) == {"north", "south"}
    assert east.returncode == 1
    assert east.stderr.startswith("E608 Site was excluded: the server rejects east: ")
    assert line["excluded_at"] == behind
    assert f"EXCLUDED at position {behind}" in words
    assert line["batches"] == report["sites"]["east"]["batches"]
