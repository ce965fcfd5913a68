"""nightsplit explain SITE.TOML: sentences and numbers before the first night, which come true."""

from __future__ import annotations

import re

import pytest

from nightsplit.console.cli import run
from tests.harness.workers import Hospital


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        ("split_labels", r"smashed: smashed, 32 numbers for each sample \(fp16\); targets, 1 number for each sample"),
        ("split_u", r"head_gradient: .* numbers for each sample"),
        ("fedavg_transfer", r"updates? of [\d,]+ weights, in \d+ messages"),
    ],
)
def test_a_run_is_explained_before_its_first_night(protocol, expected, tmp_path, capsys):
    hospital = Hospital(tmp_path / "run", protocol=protocol, epochs=2)
    assert run(["explain", str(hospital.folder / "north.toml")]) == 0
    said = capsys.readouterr().out
    assert re.search(expected, said), said
    assert "the broker reads names, kinds, sizes and hours, and nothing else" in said
    assert said.endswith("nothing so far\n")


def test_the_number_of_messages_comes_true(tmp_path, capsys):
    hospital = Hospital(tmp_path / "run", epochs=2, sites=["north"], keys=False)
    north = hospital.folder / "north.toml"
    assert run(["explain", str(north)]) == 0
    said = capsys.readouterr().out
    assert "whoever administers the broker can read everything, too" in said
    [most] = map(int, re.findall(r"At most (\d+) messages", said))
    assert hospital.in_peace()
    assert run(["explain", str(north)]) == 0
    said = capsys.readouterr().out
    assert most == int(re.search(r"smashed +(\d+)", said)[1])


def test_a_run_that_is_not_approved_is_not_explained(tmp_path, capsys):
    hospital = Hospital(tmp_path / "run", epochs=2)
    (hospital.folder / "approved.toml").unlink()
    assert run(["explain", str(hospital.folder / "north.toml")]) == 1
    assert capsys.readouterr().err.startswith("E118 ")
