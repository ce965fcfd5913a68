"""nightsplit log, on the log of a run, and the program in the documents that verifies a copy without nightsplit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.workers import Hospital

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "exit_log.md"


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """A run of one site with a night, a day and an end."""
    hospital = Hospital(tmp_path_factory.mktemp("log") / "run", epochs=2, sites=["north"])
    ServerWorker(hospital.folder / "server.toml").open_run()
    for _ in range(30):
        if SiteWorker(hospital.folder / "north.toml").work(0.3):
            return hospital
        ServerWorker(hospital.folder / "server.toml").work(0.3)
    raise AssertionError("the run does not end")


@pytest.fixture
def north(hospital):
    return str(hospital.folder / "north.toml")


def program(folder):
    """The program of the page, as a reader saves it."""
    [text] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = folder / "verify_exit_log.py"
    path.write_text(text)
    assert len(text.splitlines()) <= 60
    return path


def verified_alone(folder, exported):
    return subprocess.run(
        [sys.executable, "-I", program(folder), exported], capture_output=True, text=True, check=False
    )


def test_what_left_is_counted(north, hospital, capsys):
    assert run(["log", "show", north, "--json"]) == 0
    sent = json.loads(capsys.readouterr().out)["sent"]
    metrics = [json.loads(line) for line in (hospital.folder / "report" / "metrics.jsonl").read_text().splitlines()]
    trained = sum(line["event"] == "train" for line in metrics)
    assert sent["smashed"]["messages"] >= trained
    assert sent["smashed"]["reveals"] == ["activations", "labels"]
    assert run(["log", "show", north]) == 0
    assert "smashed" in capsys.readouterr().out


def test_a_log_is_verified_and_its_signatures_count(north, capsys):
    assert run(["log", "verify", north]) == 0
    verified = capsys.readouterr().out.splitlines()[0]
    lines, signed = map(int, re.findall(r"(\d+)", verified))
    assert 0 < signed < lines
    assert verified.endswith(", to the last message")


def test_a_stranger_verifies_a_copy(north, tmp_path, capsys):
    exported = tmp_path / "copy.jsonl"
    assert run(["log", "export", north, "--to", str(exported)]) == 0
    alone = verified_alone(tmp_path, exported)
    assert alone.returncode == 0, alone.stderr
    run(["log", "verify", north])
    assert capsys.readouterr().out.splitlines()[-1] in alone.stdout
    lines = exported.read_bytes().splitlines(keepends=True)
    for changed in (
        [*lines[:5], lines[5].replace(b'"rows":', b'"rows":1'), *lines[6:]],
        [*lines[:5], *lines[6:]],
        [*lines[:5], lines[5], *lines[5:]],
    ):
        exported.write_bytes(b"".join(changed))
        alone = verified_alone(tmp_path, exported)
        assert alone.returncode == 1
        assert re.search(r"line [56]: ", alone.stderr)


def test_a_changed_log_is_named_and_not_exported(hospital, tmp_path, capsys):
    path = hospital.folder / "state" / "north" / "exit_log.jsonl"
    before = path.read_bytes()
    try:
        path.write_bytes(before.replace(b'"rows":16', b'"rows":15', 1))
        north = str(hospital.folder / "north.toml")
        for verb in (["verify", north], ["export", north, "--to", str(tmp_path / "copy")]):
            assert run(["log", *verb]) == 1
            assert capsys.readouterr().err.startswith("E515 ")
        assert not (tmp_path / "copy").exists()
    finally:
        path.write_bytes(before)


def test_a_server_has_no_log(hospital, capsys):
    assert run(["log", "show", str(hospital.folder / "server.toml")]) == 1
    assert capsys.readouterr().err.startswith("E103 ")
