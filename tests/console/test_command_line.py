"""The command line before a verb works: what it lists, what it makes of mistakes, and what it does without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nightsplit.console import commands
from nightsplit.console.cli import run

FILES = {path.stem.replace("_", "-") for path in Path(commands.__file__).parent.glob("[!_]*.py")}
HEAVY = {"torch", "numpy", "pandas", "redis", "pika", "rich", "cryptography", "sklearn", "tensorboard"}


def listed(text: str) -> dict[str, str]:
    """The verbs of a help text, and the line of each."""
    return dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", text.partition("Commands:\n")[2], re.MULTILINE))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_every_verb_is_a_file_and_has_a_line(arguments, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert set(listed(out)) == FILES
    assert len(FILES) == 19
    assert all(line.endswith(".") and not line.endswith("..") for line in listed(out).values()), "a line is cut off"
    assert (err, "\x1b" in out) == ("", False)


@pytest.mark.parametrize(
    ("group", "verbs"),
    [
        ("dlq", {"list", "show", "replay", "discard"}),
        ("keys", {"init", "request", "new-site", "renew", "revoke", "parties", "show"}),
    ],
)
def test_a_group_lists_what_it_can_do(group, verbs, capsys):
    assert run([group]) == 0
    assert set(listed(capsys.readouterr().out)) == verbs


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, []), (0, ["--help"]), (0, ["site", "--help"]), (0, ["explain", "104"]), (0, ["dlq"]), (2, ["sit"]),
        (2, ["site"]), (2, ["server", "s.toml", "--exit-when-idel", "3"]), (2, ["query", "north.toml", "--data", "f"]),
        (2, ["dlq", "replay", "north.toml"]), (1, ["explain", "999"]),
    ],
)  # fmt: skip
def test_what_takes_time_to_load_is_not_loaded_before_a_verb_works(code, arguments):
    program = "import sys; from nightsplit.console.cli import run; code = run(sys.argv[1:]); print(*sys.modules); "
    ran = subprocess.run([sys.executable, "-c", f"{program}sys.exit(code)", *arguments], capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    loaded = set(ran.stdout.splitlines()[-1].split())
    assert "typer" in loaded
    assert not HEAVY & loaded


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sit"], "nightsplit: No such command 'sit'. Did you mean 'site'? (nightsplit --help)"),
        (["dlq", "lst"], "nightsplit dlq: No such command 'lst'. Did you mean 'list'? (nightsplit dlq --help)"),
        (
            ["site", "north.toml", "--exit-when-idel", "3"],
            "nightsplit site: No such option: --exit-when-idel (Possible options: --exit-when-idle) (nightsplit site",
        ),
        (["site"], "nightsplit site: Missing argument 'SITE.TOML'. (nightsplit site --help)"),
        (["answer", "server.toml"], "nightsplit: No such command 'answer'. (nightsplit --help)"),
        (["query", "a.toml", "--data", "b"], "Invalid value for '--data': Give --submit too."),
        (["dlq", "discard", "a.toml"], "Invalid value for 'ID': Give either ids or --all."),
        (["dlq", "discard", "a.toml", "x", "--all"], "Invalid value for 'ID': Give either ids or --all."),
    ],
)
def test_a_mistake_is_a_line_that_says_what_may_have_been_meant(arguments, says, capsys):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


def nightsplit(*arguments: str, **environment: str) -> str:
    return subprocess.run(
        ["bash", "-c", '"$0" -m nightsplit "$@"; exit $?', sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_a_shell_completes_verbs_and_options():
    script = nightsplit("--show-completion")
    assert "_NIGHTSPLIT_COMPLETE=complete_bash" in script
    assert "nightsplit" in re.findall(r"^complete .*$", script, re.MULTILINE)[0]

    def completed(line: str) -> set[str]:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        return set(nightsplit(_NIGHTSPLIT_COMPLETE="complete_bash", **words).split())

    assert completed("nightsplit se") == {"server", "serve-queries"}
    assert completed("nightsplit dlq ") == {"list", "show", "replay", "discard"}
    assert completed("nightsplit site --e") == {"--exit-when-idle"}
    assert completed("nightsplit site a.toml --log-format j") == {"json"}
