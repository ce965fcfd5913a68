"""A string that came from elsewhere is shown as text: it moves no cursor, sets no title, begins no line of ours."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import time
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from nightsplit.console.cli import run
from nightsplit.console.ui.progress import Progress
from nightsplit.console.ui.text import Screen, columns, screen
from nightsplit.server_worker.report import write_report
from nightsplit.shared.foreign import in_markdown, shown
from nightsplit.shared.protocols.handshake import HANDSHAKE
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.transport import Queue
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import contract
from tests.harness.night import Night, tiny_config
from tests.harness.study import SITES, change, write_study

ATTACKS = (
    "\x1b]0;title\x07", "\x1b]52;c;Y2xpcGJvYXJk\x07", "\x1b[31mred", "\x9b2J", "\x08\x08\x7f", "\r\nFORGED line\n\tx",
    "\u202eesrever\u2066", "\u2028\u200d", "[bold]loud[/bold]", ":smile:", "`", "|", "<img src=x onerror=alert(1)>",
    "[x](http://evil)", "\n\n# FORGED: 00",
)  # fmt: skip
HOSTILE = "loud ".join(ATTACKS)
QUEUES = {site: site_queues("ward", site, 4 * 2**30) for site in SITES}


def printable(text: str) -> str:
    """The text, which has no character that is more than text."""
    found = re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200d\u2028\u2029\u202a-\u202e\u2066-\u2069]", text)
    assert found is None, f"{found[0]!r} behind {text[: found.start()]!r}"
    return text


def inert(text: str) -> str:
    """The printable text, which has no line that we did not begin."""
    assert not re.search(r"^(# )?FORGED", text, re.MULTILINE), text
    return printable(text)


def publish(folder: Path, queue: Queue, body: bytes, headers: dict[str, str]) -> None:
    with EmbeddedBroker(folder / "broker").link([], 8, "somebody") as link:
        link.publish(queue, "m/1", [body], headers)
        while link.unconfirmed:
            link.receive(0.1)


@pytest.fixture
def study(tmp_path: Path, monkeypatch, capsys):
    """A run that is open, in the current folder."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(write_study(tmp_path))
    assert run(["open", "server.toml"]) == 0
    capsys.readouterr()
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def test_of_a_text_what_can_be_printed_is_left():
    assert shown("patient Zoë 中, 3 µg [0.1]: a_b") == "patient Zoë 中, 3 µg [0.1]: a_b"
    assert shown("a\x1b[1mb\nc\udcff") == "a?[1mb?c?"
    assert inert(shown(HOSTILE)).count("loud") == len(ATTACKS)
    assert "\n" not in shown(HOSTILE)


def test_the_screen_shows_markup_and_obeys_none(capsys):
    table = columns("", HOSTILE)
    table.add_row(HOSTILE, "x")
    console = screen()
    console.print(table)
    console.print(HOSTILE, style="bold", soft_wrap=True)
    out = inert(capsys.readouterr().out)
    assert out.splitlines()[-1].count("[bold]loud[/bold]") == 1
    assert ":smile:" in out


def test_a_server_that_rejects(study, capsys):
    """What it says goes into the line of the error, the line of progress, the log, and the run store."""
    header = Header("ward", SERVER, "north", Kind.EXCLUDED, 0)
    message = Message(header, {}, {"reason": HOSTILE})
    publish(study, QUEUES["north"].down, b"".join(wire.encode(message, contract(*HANDSHAKE)[Kind.EXCLUDED], 2**24)), {})
    assert run(["site", "north.toml"]) == 1
    out, err = capsys.readouterr()
    inert(out)
    assert inert(err).count("\n") == 1
    assert err.startswith("E608 ")
    assert "[bold]loud[/bold]" in err

    assert run(["site", "north.toml", "--log-format", "json"]) == 1
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in inert(err).splitlines()]
    assert out == ""
    assert HOSTILE in events[-1]["reason"]
    for verb in (["status", "north.toml"], ["status", "server.toml"], ["doctor", "server.toml"]):
        for form in ([], ["--json"]):
            assert run([*verb, *form]) == 0
            inert("".join(capsys.readouterr()))


def test_statuses_that_anybody_wrote_into_the_store(study, capsys):
    with closing(sqlite3.connect(study / "run.db")) as rows, rows:
        for worker in (SERVER, *SITES):
            facts = {
                "state": HOSTILE,
                "skipped_checkpoints": HOSTILE,
                "lacking": HOSTILE,
                "applied": 3,
                "digest": HOSTILE,
            }
            said = ("ward", worker, json.dumps(facts), time.time())
            rows.execute("REPLACE INTO status VALUES (?, ?, ?, ?)", said)
    rows.close()
    for verb in ("status", "doctor"):
        for form in ([], ["--json"]):
            run([verb, "server.toml", *form])
            assert len(inert("".join(capsys.readouterr()))) > 100


def test_what_a_worker_says_of_itself(capsys):
    terminal = StringIO()
    for console in (screen(), Screen(file=terminal, force_terminal=True, width=200)):
        with Progress("north", console) as progress:
            progress.warn([HOSTILE])
            progress.observe(WorkerStatus(phase=Phase.BLOCKED, detail=HOSTILE))
    inert(capsys.readouterr().out)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())  # what the library draws with
    inert(drawn.replace("\r", ""))
    assert drawn.count("loud") >= 2 * len(ATTACKS)


def test_dead_letters(study, capsys):
    """Whoever reaches the queue writes the headers; ours may quote a message."""
    around = {"number": "304", "reason": f"E304 {HOSTILE}: {HOSTILE}", "sender": HOSTILE, "queue": HOSTILE}
    publish(study, QUEUES["north"].dead, HOSTILE.encode(), {**around, "time": HOSTILE, HOSTILE: HOSTILE})
    assert run(["dlq", "list", "north.toml", "--json"]) == 0
    (letter,) = json.loads(inert(capsys.readouterr().out))["dead_letters"]
    assert letter["sender"] == HOSTILE
    assert run(["dlq", "list", "north.toml"]) == 0
    assert inert(capsys.readouterr().out).count(letter["id"]) == 1
    for form in ([], ["--json"]):
        assert run(["dlq", "show", "north.toml", letter["id"], *form]) == 0
        assert "FORGED" in inert(capsys.readouterr().out)
    assert run(["dlq", "replay", "north.toml", "--all"]) == 1
    assert inert(capsys.readouterr().err).startswith("E607 ")
    assert run(["dlq", "show", "north.toml", HOSTILE]) == 1
    assert inert(capsys.readouterr().err).startswith("E606 ")


@pytest.mark.parametrize("number", [401, 402, 403])
def test_names_of_files_columns_and_patients(study, capsys, number):
    if number == 401:
        change(study / "north.toml", '"patients.csv"', json.dumps(HOSTILE.replace("/", "")[:80]))
    elif number == 402:
        change(study / "run.toml", '"marker"', json.dumps(HOSTILE))
    else:
        text = (study / "patients.csv").read_text()
        (study / "patients.csv").write_text(text.replace(",ill\n", f',"{HOSTILE}"\n', 1))
    assert run(["site", "north.toml"]) == 1
    assert inert(capsys.readouterr().err).startswith(f"E{number} ")
    for form in ([], ["--json"]):
        assert run(["doctor", "north.toml", *form]) == 1
        assert f"E{number} " in inert(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        [HOSTILE], ["dlq", HOSTILE], ["site", f"--{HOSTILE}"], ["site", f"-{HOSTILE}"], ["site", f"--set={HOSTILE}"],
        ["site", "north.toml", HOSTILE], ["site", "north.toml", "--exit-when-idle", HOSTILE],
        ["site", "north.toml", "--log-format", HOSTILE], ["replay", "server.toml", f"--until={HOSTILE}"],
    ],
)  # fmt: skip
def test_a_command_line_that_is_wrong(arguments, capsys):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert inert(err).startswith("nightsplit")
    assert err.count("\n") == 1


def test_what_is_kept_of_a_crash(study, capsys, monkeypatch):
    def broken(*_: object) -> None:
        raise ValueError(HOSTILE)

    monkeypatch.setattr("nightsplit.console.status.summarise", broken)
    assert run(["status", "server.toml"]) == 70
    inert(capsys.readouterr().err)
    (log,) = study.glob("nightsplit-crash-*.log")
    text = printable(log.read_text(encoding="utf-8"))
    assert "\n    raise ValueError(HOSTILE)\n" in text
    assert "[bold]loud" in text


def test_the_report(tmp_path):
    night = Night(tiny_config(("north", "south"), epochs=1), tmp_path / "night").run()
    report = night.roles[SERVER].evaluation.entry(night.roles[SERVER].evaluation.best)
    report["overall"]["test"][HOSTILE] = 0.5
    write_report(tmp_path, night.config, night.roles[SERVER], dict.fromkeys(night.config.run.sites))
    text = inert((tmp_path / "report.md").read_text(encoding="utf-8"))
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert page.count("<h1>") == 1
    assert re.findall("<(?:img|a) [^>]*>", page) == ['<img src="curves.png" alt="curves" />']
    tables = [table.split("<tr>")[1:] for table in page.split("<table>")[1:]]
    assert [len({row.count("</t") - row.count("</tr") - row.count("</ta") for row in rows}) for rows in tables]
    assert "loud" in page
    inert((tmp_path / "report.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("attack", [*ATTACKS, HOSTILE, "``", "\\", "a\\"])
def test_markdown_finds_no_markup(attack):
    page = MarkdownIt("commonmark").enable("table").render(f"| a | b |\n| --- | --- |\n| {in_markdown(attack)} | c |\n")
    assert set(re.findall("<([a-z]+)", page)) == {"table", "thead", "tbody", "tr", "th", "td", "code"}
    assert page.count("<td>") == 2
    assert "<td>c</td>" in page
