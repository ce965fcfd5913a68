import json
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from nightsplit.site_worker.privacy.accounting import Use, epsilon_of, patient_epsilon
from nightsplit.site_worker.privacy.ledger import Ledger
from nightsplit.site_worker.trust.approval import approve
from tests.harness.approvals import approve_all
from tests.harness.workers import Hospital

USE = Use(0.05, 1.0, 60)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(
        '[run]\nid = "now"\nprotocol = "split_u"\nsites = ["mercy"]\n'
        '[model]\nfactory = "nightsplit.models:mlp"\nhead_cut = 2\n'
        '[task]\nkind = "binary"\n[data]\nfeatures = ["a"]\n'
    )
    (tmp_path / "site.toml").write_text(
        '[site]\nname = "mercy"\nbroker = "embedded:broker"\nstore = "sqlite:run.db"\nledger = "spent/ledger.db"\n'
        '[data]\nsource = "table"\npath = "none.csv"\n'
    )
    (tmp_path / "policy.toml").write_text("max_epsilon = 9.5\n")
    approve(tmp_path / "site.toml", "tests")
    return tmp_path / "site.toml"


def test_the_ledger_as_a_table(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(site.parent / "spent" / "ledger.db")
    for name in ("tuning", "main"):
        ledger.begin(name, name, USE, 1e-4, ["anna", "anna", "bert"], None)
        ledger.spend(name, USE.steps, None)
    ledger.close()
    assert run(["privacy", str(site), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    one, both = epsilon_of([USE], 1e-4), epsilon_of([USE, USE], 1e-4)
    assert [(line["run"], line["records"], line["steps"]) for line in told["runs"]] == [
        ("tuning", 3, 60),
        ("main", 3, 60),
    ]
    assert all((line["epsilon"], line["epsilon_rdp"]) == (one.pld, one.rdp) for line in told["runs"])
    assert (told["total"]["epsilon"], told["total"]["epsilon_rdp"]) == (both.pld, both.rdp)
    assert told["total"]["patient_epsilon"] == patient_epsilon([(USE, 2), (USE, 2)], 1e-4)
    assert (told["total"]["patient_records"], told["max_epsilon"]) == (2, 9.5)

    assert run(["privacy", str(site)]) == 0
    text = capsys.readouterr().out
    assert f"2 runs spent epsilon {both.pld:.3g} per record; policy.toml allows 9.5" in text
    assert [line.split()[0] for line in text.splitlines() if line.strip()][2:4] == ["tuning", "main"]


def test_looking_makes_no_ledger(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["privacy", str(site)]) == 0
    assert "no private run has begun" in capsys.readouterr().out
    assert not (site.parent / "spent").exists()


def test_a_damaged_ledger_is_told_by_its_number(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site.parent / "spent").mkdir()
    (site.parent / "spent" / "ledger.db").write_bytes(b"x" * 5000)
    assert run(["privacy", str(site)]) == 1
    assert capsys.readouterr().err.startswith("E612 ")


def test_a_server_has_no_ledger(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = site.with_name("server.toml")
    server.write_text('[server]\nbroker = "embedded:broker"\nstore = "sqlite:run.db"\n')
    assert run(["privacy", str(server)]) == 1
    assert capsys.readouterr().err.startswith("E103 ")


def test_a_delta_that_buys_epsilon_is_refused_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C5b of docs/explanation/attacks.md: by doctor before the first night, and by the site's worker."""
    folder = Hospital(tmp_path / "run", protocol="fedavg_dp_seg", epochs=1).folder
    settings = (folder / "run.toml").read_text()
    (folder / "run.toml").write_text(settings.replace("delta = 0.001", "delta = 0.05"))
    approve_all(folder)
    assert run(["open", str(folder / "server.toml")]) == 0
    assert run(["doctor", str(folder / "north.toml")]) == 1
    assert "E616 Delta is too large for the site's records: privacy.delta is 0.05" in capsys.readouterr().out
    assert run(["site", str(folder / "north.toml")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("E616 ")
    assert not (folder / "state" / "north" / "exit_log.jsonl").exists()
