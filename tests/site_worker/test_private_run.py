"""Real workers train with differential privacy; each hospital keeps its account, and its policy has the last word."""

import json

import pytest

from nightsplit.site_worker.worker import SiteWorker
from tests.harness.processes import open_files
from tests.harness.study import change
from tests.harness.workers import SHARES, Hospital

ROUNDS = 3
ROUNDS_ALLOWED = 'allowed = ["weights", "counts"]\nserver_sets_weights = true\n'


def private(folder, **run):
    hospital = Hospital(folder, protocol="fedavg_dp_seg", epochs=ROUNDS)
    file = folder / "run.toml"
    for key, value in run.items():
        change(file, "[run]", f"[run]\n{key} = {value}")
    for site in SHARES:
        change(folder / f"{site}.toml", "[data]", f'policy = "{site}_policy.toml"\n[data]')
        (folder / f"{site}_policy.toml").write_text(f"{ROUNDS_ALLOWED}max_epsilon = 7.0\n")
    return hospital


def account(hospital, site):
    return json.loads(hospital.call("privacy", f"{site}.toml", "--json").stdout)


@pytest.mark.timeout(300)
def test_a_night_with_noise_is_in_every_ledger(tmp_path):
    hospital = private(tmp_path / "run")
    models = hospital.in_peace()
    assert {name.split("/")[-1] for name in models} == {"model.safetensors"}
    for site in SHARES:
        told = account(hospital, site)
        (run,) = told["runs"]
        assert run["run"] == "lipids"
        assert 5.5 < run["epsilon"] <= 6.0 < run["epsilon_rdp"]
    report = json.loads((hospital.folder / "report/report.json").read_text())
    assert report["best"]["overall"]["test"]["samples"] > 0


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_a_hospital_whose_budget_is_spent_stays_away_and_the_others_go_on(tmp_path):
    hospital = private(tmp_path / "run", quorum=2, absence_hours=0.002)
    (hospital.folder / "south_policy.toml").write_text(f"{ROUNDS_ALLOWED}max_epsilon = 2.0\n")
    try:
        assert hospital.call("open", "server.toml").returncode == 0
        refused = hospital.call("site", "south.toml")
        assert refused.returncode == 1
        assert refused.stderr.startswith("E611"), refused.stderr
        assert account(hospital, "south")["runs"] == []
        for worker in ("server", "north", "east"):
            hospital.start(worker)
        hospital.wait_for_end(200)
    finally:
        hospital.close()
    report = json.loads((hospital.folder / "report/report.json").read_text())
    assert report["sites"]["south"]["excluded_at"] is not None
    assert report["sites"]["south"]["batches"] == 0
    assert report["best"] is not None


def test_a_site_that_ends_before_the_run_is_opened_closes_its_ledger(tmp_path):
    hospital = private(tmp_path / "run")
    site = SiteWorker(hospital.folder / "north.toml")
    assert site.work(idle_seconds=0.0) is False
    assert (hospital.folder / "ledgers" / "north.db").exists()
    assert open_files(hospital.folder) == []
