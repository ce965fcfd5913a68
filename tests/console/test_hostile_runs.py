"""run.toml as an attacker would write it (42 of them), met by every command that reads one at a hospital."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from nightsplit.console.doctor.checks import examine
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.protocols.build import build_model
from nightsplit.site_worker.trust.approval import approve
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.clone import ROOT
from tests.harness.hostile_runs import (
    EVIL,
    MODEL,
    NOT_APPROVED,
    NOT_LISTED,
    RUNS,
    VERBS,
    WRONG_FORM,
    factory,
    write_runs,
)
from tests.harness.processes import Fresh
from tests.harness.study import begin, change, end, write_study

REFUSED = {**dict.fromkeys(NOT_LISTED, 108), **dict.fromkeys(WRONG_FORM, 103), **dict.fromkeys(NOT_APPROVED, 118)}
APPROVED = {
    **REFUSED,
    "what its module of networks only imports": 0,
    "a file that fits its hash": 0,
    "the hash of another file": 119,
    "a file that leads out": 103,
    "a file that leads to itself": 101,
    "a folder as a file": 103,
    "a file that another process writes": 103,
    "initial weights that lead out": 103,
    "a listed package that is not installed": 104,
    "a listed package that is installed": 0,
}
"""Refusals of `nightsplit approve`; 0 where a person may approve, who has seen the code or its version."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """By command, from a process that began with nothing, in the attacker's folder, which Python searches first."""
    folder = write_study(tmp_path_factory.mktemp("study"))
    write_runs(folder)
    ran = subprocess.run(
        [sys.executable, "-m", "tests.harness.hostile_runs"], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, dict[str, object]] = json.loads(ran.stdout)
    return answer


@pytest.mark.parametrize("verb", [*VERBS])
def test_every_hostile_run_is_refused_before_anything_of_it_is_imported(
    told: dict[str, dict[str, object]], verb: str
) -> None:
    assert len(RUNS) >= 30
    expected = {
        "approve": APPROVED,
        "privacy": {**REFUSED, **dict.fromkeys(NOT_LISTED, 118)},  # it sends nothing, so it asks no policy
    }
    assert told[verb]["met"] == expected.get(verb, REFUSED)
    approved = sorted(f"hostile/{name}/approved.toml" for name, number in APPROVED.items() if number == 0)
    assert told[verb]["changed"] == (approved if verb == "approve" else [])
    assert told[verb]["imported"] == []


HARMLESS = b"""from torch import nn

def make(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A study with code of its own, which its hospitals have approved."""
    folder = write_study(tmp_path / "own")
    (folder / "model.py").write_bytes(HARMLESS)
    text = (folder / "run.toml").read_text()
    named = f'{factory("model.py:make", width=5)}code_sha256 = "{hashlib.sha256(HARMLESS).hexdigest()}"\n'
    (folder / "run.toml").write_text(text.replace(MODEL, named))
    for site in ("north", "south"):
        approve(folder / f"{site}.toml", "tests")
    return folder


def refusals(folder: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The numbers with which the commands of a hospital refuse, none of which has any effect; "" for one that works."""
    before = set(folder.rglob("*"))
    numbers = set()
    for verb in ("doctor", "site", "predict", "query", "privacy"):
        capsys.readouterr()
        code = run([verb, str(folder / "north.toml"), *VERBS[verb]])
        out, err = capsys.readouterr()
        numbers.add("" if code == 0 else re.findall(r"E\d{3} ", out if verb == "doctor" else err)[-1].strip())
    assert set(folder.rglob("*")) == before or "" in numbers
    return numbers


def test_approved_code_builds_the_model(own: Path) -> None:
    checks = {finding.check: finding for finding in examine(own / "north.toml")}
    assert checks["model and messages"].found.startswith("parameters: bottom 20, top 6;")
    assert re.fullmatch(r"tests approved the run with model.py sha256 [0-9a-f]{64} at .* UTC", checks["approval"].found)


def test_code_that_was_swapped_after_its_approval(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(HARMLESS)
    for place in range(0, len(content), 7):
        content[place] ^= 1
        (own / "model.py").write_bytes(content)
        content[place] ^= 1
        with pytest.raises(ConfigError) as caught:
            SiteWorker(own / "north.toml")
        assert caught.value.number == 119
    assert refusals(own, capsys) == {"E119"}
    assert run(["approve", str(own / "north.toml"), "--by", "x", "--yes"]) == 1, "it does not belong to run.toml"
    (own / "model.py").unlink()
    assert refusals(own, capsys) == {"E101"}
    (own / "elsewhere.py").write_bytes(HARMLESS)
    (own / "model.py").symlink_to("elsewhere.py")
    assert run(["doctor", str(own / "north.toml")]) == 0, "a link inside the folder may lead to it"
    (own / "model.py").unlink()
    (own.parent / "outside.py").write_bytes(HARMLESS)
    (own / "model.py").symlink_to("../outside.py")
    assert refusals(own, capsys) == {"E103"}


def test_code_that_is_swapped_between_the_check_and_the_build(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built has the hash, whenever the file is read."""
    site = SiteWorker(own / "north.toml")
    monkeypatch.delitem(sys.modules, f"nightsplit_model_{site.run_config.model.code_sha256}", raising=False)
    (own / "model.py").write_text(EVIL)
    monkeypatch.chdir(own)
    with pytest.raises(ConfigError) as caught:
        build_model(site.run_config, site.run_folder)
    assert caught.value.number == 119
    assert not (own / "canary").exists()


def test_a_change_of_run_toml_asks_again(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (own / "run.toml").read_text()
    for old, new in (("epochs = 3", "epochs = 4"), ("lr = 0.01", "lr = 0.02"), ("width = 5", "width = 6")):
        (own / "run.toml").write_text(text.replace(old, new))
        assert refusals(own, capsys) == {"E118"}
    (own / "run.toml").write_text(f"# a comment is no change\n{text}")
    SiteWorker(own / "north.toml")
    assert run(["doctor", str(own / "north.toml"), "--set", "run.window=999"]) == 1
    assert "E118" in capsys.readouterr().out


def test_the_approval_of_one_site_is_none_of_another(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    approvals = own / "approved.toml"
    approvals.write_text(approvals.read_text().replace('"north"', '"east"'))
    assert refusals(own, capsys) == {"E118"}
    SiteWorker(own / "south.toml")
    approvals.write_text(approvals.read_text() + "[[approval]]\n")
    assert refusals(own, capsys) == {"E103"}
    approvals.unlink()
    assert refusals(own, capsys) == {"E118"}


def test_another_version_of_a_package_asks_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "study")
    policy = folder / "policy.toml"
    policy.write_text(policy.read_text() + 'packages = ["sklearn.datasets"]\n')
    change(folder / "run.toml", MODEL, factory("sklearn.datasets:load_iris"))
    approval = approve(folder / "north.toml", "tests")
    assert re.fullmatch(r"scikit-learn \d[\d.]+", str(approval.code))
    SiteWorker(folder / "north.toml")
    (folder / "approved.toml").write_text((folder / "approved.toml").read_text().replace(str(approval.code), "sk 0.1"))
    assert refusals(folder, capsys) == {"E119"}


def test_a_file_of_the_current_folder_is_no_installed_package(tmp_path: Path) -> None:
    """Python puts this folder first into its path when it starts a module."""
    folder = write_study(tmp_path / "study")
    policy = folder / "policy.toml"
    policy.write_text(policy.read_text() + 'packages = ["sklearn.datasets"]\n')
    change(folder / "run.toml", MODEL, factory("sklearn.datasets:load_iris", nothing=1))
    for name in ("sklearn", "pathlib"):
        (folder / f"{name}.py").write_text(EVIL)
    out, _ = end(begin(folder, "doctor", "north.toml", kind=Fresh), 1)
    assert "sklearn.datasets:load_iris does not take model.settings" in out
    assert not (folder / "canary").exists()


def test_a_server_takes_the_code_of_its_run_alone(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs no approval, but a file of the right hash."""
    assert run(["open", str(own / "server.toml")]) == 0
    (own / "model.py").write_text(EVIL)
    sys.modules.pop(f"nightsplit_model_{hashlib.sha256(HARMLESS).hexdigest()}")
    assert run(["open", str(own / "server.toml")]) == 1
    assert capsys.readouterr().err.startswith("E119 ")
    assert not (own / "canary").exists()
