"""nightsplit approve: what a person is shown, is asked, and what stays of the answer."""

from __future__ import annotations

import hashlib
import io
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from nightsplit.shared.protocols.load import load_run
from nightsplit.site_worker.trust.approval import approve
from tests.harness.hostile_runs import MODEL, factory
from tests.harness.study import change, write_study

CODE = """from torch import nn

def make(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Nothing of it is approved."""
    folder = write_study(tmp_path / "study")
    (folder / "approved.toml").unlink()
    return folder


def use_code(folder: Path, text: str | bytes) -> None:
    """Make the run's network one of its own."""
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "model.py").write_bytes(content)
    named = f'{factory("model.py:make", width=5)}code_sha256 = "{hashlib.sha256(content).hexdigest()}"\n'
    plain = (folder / "run.toml").read_text()
    before = plain[plain.index("factory") : plain.index("cut = 1")]
    (folder / "run.toml").write_text(plain.replace(before, named))


def entries(folder: Path) -> list[dict[str, object]]:
    """What the file of approvals holds."""
    file = folder / "approved.toml"
    found: list[dict[str, object]] = tomllib.loads(file.read_text())["approval"] if file.exists() else []
    return found


def ask(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *answers: str, code: int = 0
) -> str:
    """What `nightsplit approve north.toml` shows to a person who answers so."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{answer}\n" for answer in answers)))
    capsys.readouterr()
    assert run(["approve", str(folder / "north.toml")]) == code
    return capsys.readouterr().out


def test_what_is_shown_and_what_stays_of_the_answer(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = ask(study, capsys, monkeypatch, "y", 'Dr. "Ø" Öz\x7f')
    for line in (
        "Run ward, protocol split_labels, digest ",
        "the server and administrators of the broker can read",
        "labels: the values to be predicted, of each patient in a message",
        "activations: outputs of the site's layers for each patient in a message",
        "allows the run",
        "Network: nightsplit.models:mlp(inputs = 3, hidden = [8, 4], outputs = 1)",
        "Code: of nightsplit itself",
        "All settings:",
        "  run.epochs = 3",
        '  wire.smashed = "fp16"',
        "Approve this run for north? [y/N] ",
    ):
        assert line in shown
    (entry,) = entries(study)
    config = load_run(study / "run.toml")
    assert (entry["site"], entry["run"], entry["person"]) == ("north", "ward", 'Dr. "Ø" Öz\x7f')
    assert (entry["digest"], entry["settings"]) == (config.digest, config.canonical())
    time = entry["time"]
    assert isinstance(time, datetime)
    assert abs((datetime.now(UTC) - time).total_seconds()) < 100
    assert "code" not in entry
    assert (study / "approved.toml").stat().st_mode & 0o777 == 0o600
    assert "approved already, by" in ask(study, capsys, monkeypatch)
    assert len(entries(study)) == 1


@pytest.mark.parametrize("answers", [[], [""], ["n"], ["no"], ["yours"], ["y"], ["yes", ""], ["yes", "  "]])
def test_without_a_yes_and_a_name_nothing_is_approved(
    study: Path, answers: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing was changed" in ask(study, capsys, monkeypatch, *answers, code=1)
    assert not (study / "approved.toml").exists()


def test_scripts_name_a_person(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    north = str(study / "north.toml")
    assert run(["approve", north, "--yes"]) == 2
    assert run(["approve", north, "--by", "anna", "--yes", "--set", "run.epochs=7"]) == 0
    assert run(["approve", north, "--by", "bert", "--yes"]) == 0
    assert run(["approve", north, "--by", "carl", "--yes"]) == 0
    assert [entry["person"] for entry in entries(study)] == ["anna", "bert"]
    assert run(["doctor", north, "--set", "run.epochs=7"]) == 0
    assert "anna approved the run" in capsys.readouterr().out


def test_what_the_policy_forbids_is_not_asked(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(study / "policy.toml", '"labels", ', "")
    shown = ask(study, capsys, monkeypatch, "y", "anna", code=1)
    assert "FORBIDDEN" in shown
    assert "Approve" not in shown
    assert not (study / "approved.toml").exists()


def test_changes_are_shown_with_their_code(
    study: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_code(study, CODE)
    shown = ask(study, capsys, monkeypatch, "y", "anna")
    assert "All code:" in shown
    assert "      return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))" in shown
    first = (study / "approved.toml").read_bytes()
    assert entries(study)[0]["text"] == CODE

    use_code(study, CODE.replace("nn.ReLU()", "nn.Tanh()"))
    (study / "run.toml").write_text((study / "run.toml").read_text().replace("epochs = 3", "epochs = 9"))
    shown = ask(study, capsys, monkeypatch, "y", "bert")
    assert "Changes of the code since ward, approved by anna:" in shown
    changed = [line.strip() for line in shown.splitlines() if line.startswith(("  +", "  -"))]
    assert "-    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))" in changed
    assert "+    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))" in changed
    assert {"-run.epochs = 3", "+run.epochs = 9"} <= set(changed)
    assert (study / "approved.toml").read_bytes().startswith(first), "an entry was changed"

    use_code(study, CODE)
    shown = ask(study, capsys, monkeypatch, "y", "carl")
    assert "+    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))" in shown
    (study / "run.toml").write_text((study / "run.toml").read_text().replace("epochs = 9", "epochs = 8"))
    assert "No change of the code since ward, approved by carl." in ask(study, capsys, monkeypatch, code=1)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("# \u202e}\n", "line 1: the character U+202E cannot be seen"),
        ("x = 1\n# harmless\rimport os\n", "line 2: the character U+000D cannot be seen"),
        ("\x1b[2Jx = 1\n", "line 1: the character U+001B cannot be seen"),
        ("x = 1\n\u200bx = 2\n", "line 2: the character U+200B cannot be seen"),
        (b"# -*- coding: latin-1 -*-\n# \xe9\n", "not UTF-8 text"),
    ],
    ids=["direction", "return", "escape", "width", "encoding"],
)  # fmt: skip
def test_code_that_a_reader_would_not_see(
    study: Path, content: str | bytes, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    use_code(study, content)
    assert run(["approve", str(study / "north.toml"), "--by", "anna", "--yes"]) == 1
    assert says in capsys.readouterr().err
    assert not (study / "approved.toml").exists()


def test_code_is_run_as_the_text_that_was_shown(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A comment that declares an encoding, in which another comment would be a line of code."""
    use_code(study, f"# -*- coding: utf-7 -*-\n# +AAo-raise SystemExit\n{CODE}")
    assert run(["approve", str(study / "north.toml"), "--by", "anna", "--yes"]) == 0
    assert run(["doctor", str(study / "north.toml")]) == 0
    assert "bottom 20, top 6" in capsys.readouterr().out


def test_the_file_cannot_be_written(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(study / "north.toml", "[site]", '[site]\napprovals = "policy.toml/approved.toml"')
    assert run(["approve", str(study / "north.toml"), "--by", "anna", "--yes"]) == 1
    assert capsys.readouterr().err.startswith("E501 ")


def test_the_public_function_approves_once(study: Path) -> None:
    change(study / "north.toml", "[site]", '[site]\napprovals = "kept/approved.toml"')
    (study / "kept").mkdir()
    assert approve(study / "north.toml", "anna") == approve(study / "north.toml", "bert")
    assert MODEL in (study / "run.toml").read_text()
