"""The command line over the embedded broker: a night without a server, the day after, and what users may ask."""

from __future__ import annotations

import csv
import json
import re
import signal
from contextlib import closing
from io import StringIO
from pathlib import Path

import pytest
import redis

from nightsplit.console.cli import run
from nightsplit.shared.run_store.status import Phase, SiteStatus, WorkerStatus
from tests.harness.approvals import approve_all
from tests.harness.processes import Fresh
from tests.harness.services import declared_as, wait_until
from tests.harness.study import SITES, begin, change, end, end_all, queued, write_study


@pytest.fixture(autouse=True)
def clean():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    end_all()


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """After the first night: the run is open, both sites have sent all they had, no server was there."""
    folder = write_study(tmp_path_factory.mktemp("study"))
    out, _ = end(begin(folder, "open", "server.toml"))
    assert "run ward is open; north, south may begin" in out
    sites = [begin(folder, "site", f"{site}.toml", "--exit-when-idle", "2") for site in SITES]
    for site in sites:
        out, _ = end(site)
        assert "nothing more to do at present; start the same command again to continue" in out
    return folder


def status(folder: Path, name: str, capsys) -> dict:
    assert run(["status", str(folder / name), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_night_and_a_day(study, capsys, tmp_path):
    # The night: a server that is offline is a state, and no error.
    for name, sites in (("north.toml", ["north"]), ("server.toml", ["north", "south"])):  # a site sees itself alone
        night = status(study, name, capsys)
        sent = {line["worker"]: line["sent"] for line in night["workers"]}
        assert list(sent) == ["server", *sites]
        batches = sum(sent[site] for site in sites)
        assert batches > 15
        assert night["sentence"] == f"server is offline; {batches} batches queued, they will be trained when it returns"
        for line in night["workers"][1:]:
            assert (line["state"], line["online"]) == ("away", False)
            assert line["sent"] == line["planned"] == line["confirmed"] == line["queued"]
            assert (line["answered"], line["applied"], line["refused"], line["duplicates"]) == (0, 0, 0, 0)
        assert (
            night["at_broker"]["north"]["up"] == sent["north"] + 3
        )  # with its greetings, the last one after its last message
    assert run(["predict", str(study / "north.toml")]) == 1
    assert "E605" in capsys.readouterr().err

    # The day: everything is trained while no site is there.
    out, _ = end(begin(study, "server", "server.toml", "--exit-when-idle", "20"))
    assert "run ward is finished; report in report" in out
    assert json.loads((study / "report" / "report.json").read_text())["sites"]["north"]["messages"] == sent["north"]

    # The next night: the answers are waiting.
    sites = [begin(study, "site", f"{site}.toml") for site in SITES]
    for name, site in zip(SITES, sites, strict=True):
        out, _ = end(site)
        assert f"run ward is finished; the site's part of the model is in state/{name}/model" in out
    day = status(study, "south.toml", capsys)
    assert day["sentence"] == "the run is finished"
    assert [line["state"] for line in day["workers"]] == ["finished"] * 2
    assert [line["queued"] for line in day["workers"]] == [None, 0]
    assert run(["status", str(study / "server.toml")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ward: the run is finished\n")
    assert [line.split()[:2] for line in out.splitlines()[-3:]] == [
        ["server", "finished"], ["north", "finished"], ["south", "finished"],
    ]  # fmt: skip
    check_predictions(study, capsys, tmp_path)


def check_predictions(study, capsys, tmp_path):
    report = json.loads((study / "report" / "report.json").read_text())
    test = report["best"]["sites"]["north"]["test"]
    assert run(["predict", str(study / "north.toml")]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(StringIO(out)))
    assert list(rows[0]) == ["row", "patient", "prediction"]
    assert len(rows) == test["samples"]
    assert all(0 <= float(row["prediction"]) <= 1 for row in rows)
    told = dict(figure.rsplit(" ", 1) for figure in err.strip().split(", "))
    assert float(told["loss"]) == pytest.approx(test["loss"], abs=2e-3)  # smashed data travel as fp16
    assert float(told["auc"]) == pytest.approx(test["auc"], abs=0.03)

    # Another file, and the server's half by hand: the same model, over patients of both sites.
    (study / "state/north/model/top.safetensors").rename(tmp_path / "top.safetensors")
    assert run(["predict", str(study / "north.toml")]) == 1
    assert "E604" in capsys.readouterr().err
    asked = ["predict", str(study / "north.toml"), "--data", str(study / "patients.csv")]
    for top in (tmp_path / "top.safetensors", study / "report" / "top.safetensors"):
        assert run([*asked, "--top", str(top), "--output", str(tmp_path / f"{top.parent.name}.csv")]) == 0
    exported, reported = ((tmp_path / f"{name}.csv").read_text() for name in (tmp_path.name, "report"))
    assert exported == reported
    everyone = list(csv.DictReader(StringIO(exported)))
    assert len(everyone) == 120
    by_patient = {row["patient"]: row["prediction"] for row in everyone}
    assert all(by_patient[row["patient"]] == row["prediction"] for row in rows), "the scaling is another one"
    capsys.readouterr()
    wrong = str(study / "state/north/model/bottom.safetensors")
    assert run([*asked, "--top", wrong]) == 1
    assert "E601" in capsys.readouterr().err


def test_a_silent_worker_is_offline_and_its_last_words_are_kept(study, capsys):
    from nightsplit.console.status import in_words, summarise
    from nightsplit.console.worker_file import WorkerFile
    from nightsplit.shared.run_store.base import Status

    class Store:
        def __init__(self, **ages):
            self.ages = ages

        def statuses(self, workers):
            server = WorkerStatus(phase=Phase.WORKING, applied=5, planned=90, sites={"north": SiteStatus(applied=5)})
            said = {"server": server, "north": WorkerStatus(phase=Phase.WORKING, sent=30, confirmed=30, answered=4)}
            return {name: Status(name, said[name], age) for name, age in self.ages.items() if name in workers}

        def close(self):
            pass

    def seen(**ages):
        class File(WorkerFile):
            def open_store(self):
                return Store(**ages)

        return summarise(File(study / "server.toml"))

    at_work = seen(server=1.0, north=190.0)
    assert at_work["sentence"].startswith("server is working; 5 of 90 messages applied, ")
    north, south = at_work["workers"][1:]
    assert (north["state"], north["online"], north["queued"]) == ("working", False, 25)
    assert in_words(north) == "OFFLINE for 3 min (was working)"
    assert (south["state"], south["online"]) == (None, False)
    assert in_words(south) == "no report yet"
    assert seen(server=11.0, north=1.0)["sentence"].startswith("server is offline; ")
    assert seen(north=1.0)["sentence"].startswith("the server has not reported yet; ")


def test_nothing_is_known_of_a_run_that_was_never_opened(tmp_path, capsys):
    write_study(tmp_path)
    assert run(["status", str(tmp_path / "server.toml")]) == 1
    assert capsys.readouterr().err.startswith("E605 Run is unknown: ")


def doctor(file: Path, capsys, code: int, *more: str) -> dict[str, dict]:
    assert run(["doctor", str(file), "--json", *more]) == code
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is (code == 0)
    return {finding["check"]: finding for finding in answer["checks"]}


def test_doctor_finds_nothing_wrong(study, capsys):
    checks = doctor(study / "north.toml", capsys, 0)
    assert not any(finding["fix"] for finding in checks.values()), checks
    assert re.fullmatch(
        r"training: \d+ rows of \d+ patients \(\d+ of class healthy, \d+ of class ill\); validation: .*; test: .*",
        checks["data"]["found"],
    )
    assert checks["broker"]["found"] == "reached; all 3 queues exist"
    assert checks["configuration"]["found"].startswith("run ward, split_labels, sites north, south; run digest ")
    assert set(doctor(study / "server.toml", capsys, 0)) == set(checks) - {"policy", "approval", "data"}
    assert run(["doctor", str(study / "south.toml")]) == 0
    assert capsys.readouterr().out.split()[:3] == ["check", "found", "fix"]


LATE = ['run.protocol="split_u"', "model.head_cut=2", "run.window=4"]


@pytest.mark.parametrize(
    ("changes", "late", "suits"),
    [
        ([], "steps late, with equal sites: bottom 999, top 0", True),
        (["run.window=1"], "every gradient is used at once", True),
        ([*LATE, "run.window=1"], "every gradient is used at once", True),
        ([*LATE, "run.window=10", 'run.learning="targets"'], "none, the run learns by targets", True),
        (LATE, "bottom 3, top 4, head 0", False),
        ([*LATE, 'optimizer.bottom.name="muon"'], "top 4", False),
        ([*LATE, 'optimizer.top.name="muon"'], "top 4", True),
        ([*LATE, "optimizer.top.betas=[0.0, 0.9]"], "top 4", True),
        ([*LATE, "run.window=2"], "top 2", True),
    ],
)
def test_doctor_says_how_late_gradients_come_and_whether_that_suits(changes, late, suits, tmp_path, capsys):
    write_study(tmp_path)
    (tmp_path / "policy.toml").write_text('allowed = ["labels", "activations", "gradients", "counts"]\n')
    approve_all(tmp_path, changes)
    more = [word for change in changes for word in ("--set", change)]
    for worker in ("server", "north"):
        finding = doctor(tmp_path / f"{worker}.toml", capsys, 0, *more)["late gradients"]
        assert late in finding["found"]
        assert (finding["fix"] is None) is suits
        assert suits or all(way in finding["fix"] for way in ("window = 1", "muon", "betas"))


@pytest.mark.redis
@pytest.mark.parametrize(("setting", "value", "lost"), [
    ("appendfsync", "always", None), ("appendfsync", "everysec", "up to 2 s"), ("appendonly", "no", "all"),
])  # fmt: skip
def test_doctor_says_what_redis_loses_at_a_power_cut(setting, value, lost, tmp_path, redis_server, capsys):
    folder = write_study(tmp_path)
    change(folder / "server.toml", "sqlite:run.db", redis_server.url)
    with closing(redis.Redis.from_url(redis_server.url)) as client:
        client.config_set(setting, value)
        try:
            finding = doctor(folder / "server.toml", capsys, 0)["power cut"]
        finally:
            client.config_set("appendfsync", "always")
            client.config_set("appendonly", "yes")
    assert (finding["fix"] is None) is (lost is None)
    assert lost is None or lost in finding["found"]


@pytest.mark.rabbitmq
def test_doctor_says_what_classic_queues_lose_at_a_power_cut(tmp_path, rabbitmq, capsys):
    folder, url = write_study(tmp_path), rabbitmq.vhost()
    for worker in ("server", "north"):
        change(folder / f"{worker}.toml", "embedded:broker", url)

    def power_cut(queue_type):
        with declared_as(queue_type):
            return doctor(folder / "server.toml", capsys, 0)

    assert power_cut("quorum")["power cut"]["fix"] is None, "none is created yet"
    with declared_as("classic"):
        assert run(["open", str(folder / "server.toml")]) == 0
    capsys.readouterr()
    upgraded = power_cut("quorum")
    assert upgraded["broker"]["found"] == "reached; all 6 queues exist, with the run's limits"
    assert "the run's queues are classic" in upgraded["power cut"]["found"]
    assert "nightsplit move" in upgraded["power cut"]["fix"]
    assert power_cut("classic")["power cut"] == {
        "check": "power cut", "found": "RabbitMQ loses nothing that it has confirmed", "fix": None, "failed": False,
    }  # fmt: skip
    assert "power cut" not in doctor(folder / "north.toml", capsys, 0), "a site may not ask"


def test_doctor_stops_at_the_first_closed_gate(tmp_path, capsys):
    write_study(tmp_path)
    run_toml = (tmp_path / "run.toml").read_bytes()
    change(tmp_path / "policy.toml", '"labels", ', "")
    (tmp_path / "run.toml").write_bytes(run_toml.replace(b"epochs = 3", b"epochs = 4"))
    change(tmp_path / "north.toml", '"north"', '"nobody"')

    def last() -> tuple[str, str]:
        checks = doctor(tmp_path / "north.toml", capsys, 1)
        failed = [(name, finding["found"][:4]) for name, finding in checks.items() if finding["failed"]]
        assert len(failed) == 1
        assert failed[0][0] == list(checks)[-1]
        return failed[0]

    assert last() == ("configuration", "E602")
    change(tmp_path / "north.toml", '"nobody"', '"north"')
    assert last() == ("policy", "E108")
    change(tmp_path / "policy.toml", '["', '["labels", "')
    assert last() == ("approval", "E118")
    (tmp_path / "run.toml").write_bytes(run_toml)
    assert "approval" in doctor(tmp_path / "north.toml", capsys, 0)


def test_doctor_names_every_problem_behind_the_gates_at_once(tmp_path, capsys):
    write_study(tmp_path)
    change(tmp_path / "patients.csv", "age,pressure", "years,pressure")
    change(tmp_path / "run.toml", "cut = 1", "cut = 3")
    change(tmp_path / "north.toml", "[site]", '[site]\nshift = "22:00-06:00 Mars/Crater"\ndevice = "cuda:7"')
    change(tmp_path / "north.toml", "sqlite:run.db", "sqlite:policy.toml/run.db")
    checks = doctor(tmp_path / "north.toml", capsys, 1)
    failed = {name: finding["found"].split()[0] for name, finding in checks.items() if finding["failed"]}
    assert failed == {
        "data": "E402", "model and messages": "E105", "run store": "E207", "torch": "E109",
        "shift": "E106",
    }  # fmt: skip
    assert all(finding["fix"] for finding in checks.values() if finding["failed"])


def test_doctor_shows_no_patients_value_and_plans_the_messages(tmp_path, capsys):
    write_study(tmp_path)
    text = (tmp_path / "patients.csv").read_text().splitlines()
    text[5] = "SECRET" + text[5][text[5].index(",") :]
    (tmp_path / "patients.csv").write_text("\n".join(text))
    change(tmp_path / "north.toml", "share = [0.0, 0.5]", "share = [0.0, 1.0]")
    approve_all(tmp_path, ["wire.message_bytes=64"])
    checks = doctor(tmp_path / "north.toml", capsys, 1, "--set", "wire.message_bytes=64")
    assert "line 6, column age" in checks["data"]["found"]
    assert "SECRET" not in checks["data"]["found"]
    assert checks["model and messages"]["found"].startswith("E203 ")
    change(tmp_path / "server.toml", "[server]", "[hospital]")
    assert "E103" in doctor(tmp_path / "server.toml", capsys, 1)["configuration"]["found"]


def test_ctrl_c_and_the_same_command_again(tmp_path):
    write_study(tmp_path)
    change(tmp_path / "run.toml", "window = 1000", "window = 2")
    change(tmp_path / "run.toml", "epochs = 3", "epochs = 60")
    change(tmp_path / "run.toml", '["north", "south"]', '["north"]')
    assert run(["open", str(tmp_path / "server.toml")]) == 0
    stopped = "stopped; start the same command again to continue\n"

    north = begin(tmp_path, "site", "north.toml", kind=Fresh)
    wait_until(lambda: queued(tmp_path, "north") == 4, 90, "two greetings and two batches")
    north.send_signal(signal.SIGTERM)
    assert end(north, 0)[1] == stopped

    north, server = (
        begin(tmp_path, name, f"{worker}.toml", kind=Fresh)
        for name, worker in (("site", "north"), ("server", "server"))
    )
    metrics = tmp_path / "report" / "metrics.jsonl"
    wait_until(lambda: metrics.stat().st_size > 0, 90, "some training")
    server.send_signal(signal.SIGINT)
    out, err = end(server, 130)
    assert err == stopped
    assert "is finished" not in out
    for process in (begin(tmp_path, "server", "server.toml"), north):
        assert "is finished" in end(process)[0]


def test_an_unknown_error_becomes_a_file_and_a_line(tmp_path, monkeypatch, capsys):
    write_study(tmp_path)
    monkeypatch.chdir(tmp_path)

    def broken(*_: object) -> None:
        patient = "-".join(("zoe", "1955"))
        raise ZeroDivisionError(f"a bug at {len(patient)}")

    monkeypatch.setattr("nightsplit.console.status.summarise", broken)
    assert run(["status", "server.toml"]) == 70
    out, err = capsys.readouterr()
    (log,) = tmp_path.glob("nightsplit-crash-*.log")
    assert out == ""
    assert err.count("\n") == 1
    assert log.name in err
    assert "Traceback" not in err
    assert "ZeroDivisionError: a bug at 8" in log.read_text()
    assert "zoe-1955" not in err + log.read_text(), "variables may hold something of a patient"
    assert log.stat().st_mode & 0o077 == 0
    assert run(["status", "server.toml"]) == 70
    assert len(list(tmp_path.glob("nightsplit-crash-*.log"))) == 2, "no name is foreseen"


def test_a_full_disk_and_an_early_ctrl_c_have_their_sentences(tmp_path, monkeypatch, capsys):
    write_study(tmp_path)
    for raised, code, said in (
        (OSError(28, "No space left on device", "report.json"), 1, "E501 File cannot be written: report.json"),
        (PermissionError(13, "Permission denied", "report"), 1, "report: Permission denied. Fix: make room, or name"),
        (KeyboardInterrupt(), 130, "stopped; start the same command again to continue"),
    ):

        def fail(*_: object, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr("nightsplit.console.status.summarise", fail)
        assert run(["status", str(tmp_path / "server.toml")]) == code
        assert said in capsys.readouterr().err
