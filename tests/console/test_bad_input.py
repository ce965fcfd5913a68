"""What a user can get wrong: a number, a sentence, a remedy and a page; and what was done before stays as it was."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nightsplit.console.cli import run
from nightsplit.shared.errors import TITLES
from nightsplit.shared.runtime.process import lock_folder
from tests.harness.approvals import approve_all
from tests.harness.services import RabbitNode, free_port
from tests.harness.study import change, contents, queued, write_study

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def night(tmp_path_factory) -> Path:
    """A run that was opened, and in which north has worked on two nights without a server; south never began."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = write_study(tmp_path_factory.mktemp("night"))
    assert run(["open", str(folder / "server.toml")]) == 0
    for _ in range(2):
        assert run(["site", str(folder / "north.toml"), "--exit-when-idle", "0.3"]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder


@pytest.fixture
def study(night, tmp_path):
    """The test's own copy of `night`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = tmp_path / "study"
    shutil.copytree(night, folder)
    yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(folder: Path, capsys, number: int, *arguments: str, greetings: int = 0) -> str:
    """Carry out a command that has to fail with this error, and to leave everything else alone."""
    state, batches = contents(folder / "state"), queued(folder, "north")
    capsys.readouterr()
    verb, file, *more = arguments
    assert run([verb, str(folder / file), *more]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"E{number} {TITLES[number]}: "), err
    assert err.endswith(f" (nightsplit explain {number})\n")
    assert len(err.partition(" Fix: ")[2]) > len(f"(nightsplit explain {number})") + 10
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    after = contents(folder / "state")
    assert {name: after.get(name) for name in state} == state
    assert not any("checkpoints" in name or "model" in name for name in after.keys() - state.keys())
    assert queued(folder, "north") == batches
    assert queued(folder, "south") <= greetings, "something was sent"
    return err


def edit(file: str, old: str, new: str) -> Edit:
    return lambda folder: change(folder / file, old, new)


def rewrite(file: str, content: bytes) -> Edit:
    return lambda folder: (folder / file).write_bytes(content)


def remove(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def one_class(folder: Path) -> None:
    table = folder / "patients.csv"
    table.write_text(table.read_text().replace("healthy", "ill"))


@pytest.mark.parametrize(
    ("number", "says", "spoil"),
    [
        (101, "run.toml: No such file", remove("run.toml")),
        (101, "south.toml: No such file", remove("south.toml")),
        (102, "run.toml: Expected '=' after a key", edit("run.toml", "window = 1000", "window 1000")),
        (102, "not UTF-8 text", rewrite("south.toml", b'[site]\nname = "s\xfcd"\n')),
        (103, "run: has an unknown key windows (did you mean window?).", edit("run.toml", "window =", "windows =")),
        (103, "model: misses the required key factory", edit("run.toml", "factory =", "# factory =")),
        (103, "run.window: expected int, got str", edit("run.toml", "window = 1000", 'window = "wide"')),
        (103, "run.window: expected int >= 1", edit("run.toml", "window = 1000", "window = 0")),
        (103, "'split_label' is unknown (did you mean split_labels?)", edit("run.toml", "split_labels", "split_label")),
        (103, "run.bottoms: invalid enum value 'avg'.", edit("run.toml", "[run]", '[run]\nbottoms = "avg"')),
        (103, "'averagd' (did you mean averaged?)", edit("run.toml", "[run]", '[run]\nbottoms = "averagd"')),
        (103, "'label' (did you mean labels?)", edit("policy.toml", '"labels"', '"label"')),
        (103, "has an unknown key polizy (did you mean policy?)", edit("south.toml", "[site]", '[site]\npolizy = "p"')),
        (108, 'needs "ward.models" in packages', edit("run.toml", "nightsplit.models", "ward.models")),
        (104, "does not take model.settings", edit("run.toml", "inputs = 3", "columns = 3")),
        (105, "with model.cut = 3: nothing is left for the top", edit("run.toml", "cut = 1", "cut = 3")),
        (106, "begins when it ends", edit("south.toml", "[site]", '[site]\nshift = "22:00-22:00 UTC"')),
        (106, "is not of the form HH:MM-HH:MM Zone", edit("south.toml", "[site]", '[site]\nshift = "22:00-06:00"')),
        (107, 'unknown scheme "mqtt"', edit("south.toml", "embedded:broker", "mqtt://ward")),
        (108, 'needs "labels" in allowed (the values to be predicted', edit("policy.toml", '"labels", ', "")),
        (109, "device 'cuda:7'", edit("south.toml", "[site]", '[site]\ndevice = "cuda:7"')),
        (401, "nowhere.csv does not exist", edit("south.toml", "patients.csv", "nowhere.csv")),
        (401, "not UTF-8 text", rewrite("patients.csv", b"age,outcome\n\xff\xfe,1\n")),
        (402, "has no column 'marker'", edit("patients.csv", "marker", "blood")),
        (402, "has no column 'died'; it has age, pressure, marker, outcome", edit("south.toml", "outcome", "died")),
        (403, "is not one of data.classes", edit("run.toml", '["healthy", "ill"]', '["well", "ill"]')),
        (404, "training rows are of class 1", one_class),
        (602, "south is not among the sites of ward: north, west", edit("run.toml", '"south"', '"west"')),
    ],
)  # fmt: skip
def test_a_site_says_what_is_wrong(study, capsys, number, says, spoil):
    spoil(study)
    if number == 602:
        assert says in refused_without_queues(study, capsys, number)
    else:
        assert says in refused(study, capsys, number, "site", "south.toml")


def refused_without_queues(folder: Path, capsys, number: int) -> str:
    """As `refused`; the run that the file names now has other queues."""
    assert run(["site", str(folder / "south.toml")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"E{number} {TITLES[number]}: ")
    assert not (folder / "state" / "south").exists()
    return err


@pytest.mark.parametrize("changed", ["model.cut=2", "run.seed=5"])
def test_a_site_that_was_configured_differently_sends_no_data(study, capsys, changed):
    """At most the greeting that asks for the manifest, which tells no number of patients."""
    approve_all(study, [changed])
    said = refused(study, capsys, 601, "site", "south.toml", "--set", changed, greetings=1)
    assert "agree on one run.toml. Nothing of a patient was sent." in said
    key, _, value = changed.partition("=")
    assert f"here {key} = {value}" in said


def test_set_is_checked_as_a_file_is(study, capsys):
    assert "run.window: expected int >= 1" in refused(study, capsys, 103, "site", "south.toml", "--set", "run.window=0")
    assert "not of the form section.key=value" in refused(study, capsys, 103, "site", "south.toml", "--set", "window")


def test_a_file_of_the_other_side(study, capsys):
    refused(study, capsys, 103, "server", "south.toml")
    refused(study, capsys, 103, "site", "server.toml")
    assert "neither [server] nor [site]" in refused(study, capsys, 103, "status", "run.toml")


def test_the_broker_cannot_be_reached(study, capsys, monkeypatch):
    monkeypatch.setattr("nightsplit.broker.rabbitmq.broker.FIRST_CONNECTION_S", 0.5)
    secret = f"amqp://ward:secret@127.0.0.1:{free_port()}/%2F"
    change(study / "server.toml", "embedded:broker", secret)
    assert "secret" not in refused(study, capsys, 201, "server", "server.toml")
    assert "secret" not in refused(study, capsys, 201, "open", "server.toml")


@pytest.mark.rabbitmq
def test_the_broker_refuses_the_login(study, capsys, rabbitmq: RabbitNode):
    wrong = rabbitmq.vhost().replace("guest:guest", "guest:wrong")
    for file in ("server", "south"):
        change(study / f"{file}.toml", "embedded:broker", wrong)
    refused(study, capsys, 202, "server", "server.toml")
    refused(study, capsys, 202, "site", "south.toml")


def test_the_run_store_cannot_be_used(study, capsys):
    change(study / "server.toml", "sqlite:run.db", "sqlite:policy.toml/run.db")
    refused(study, capsys, 207, "server", "server.toml")


def test_the_state_folder_is_in_use(study, capsys):
    with lock_folder(study / "state" / "north"):
        refused(study, capsys, 503, "site", "north.toml")


def test_the_data_changed_since_the_run_began(study, capsys):
    change(study / "patients.csv", ",ill\n", "1,ill\n")
    refused(study, capsys, 409, "site", "north.toml")


def checkpoints(folder: Path) -> list[Path]:
    """North's checkpoints, oldest first."""
    found = sorted((folder / "state" / "north" / "checkpoints").iterdir())
    assert len(found) == 2
    return found


def damage(checkpoint: Path) -> None:
    file = checkpoint / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_all_checkpoints_are_damaged(study, capsys):
    for checkpoint in checkpoints(study):
        damage(checkpoint)
    assert "tensors are damaged" in refused(study, capsys, 502, "site", "north.toml")


def test_one_checkpoint_is_damaged(study, capsys):
    before, newest = queued(study, "north"), checkpoints(study)[1]
    damage(newest)
    capsys.readouterr()
    assert run(["site", str(study / "north.toml"), "--exit-when-idle", "0.3"]) == 0
    out, err = capsys.readouterr()
    assert f"warning: skipped a damaged checkpoint: {newest.name}: the tensors are damaged" in out
    assert err == ""
    assert queued(study, "north") >= before
