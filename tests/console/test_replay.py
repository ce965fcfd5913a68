"""Recording and replaying with real processes, and a disk that is full while it records."""

import json
import os
import subprocess
from contextlib import suppress
from hashlib import sha256

import pytest

from nightsplit.console.cli import run
from nightsplit.server_worker.tape import _HEAD, FOLDER, Tape, read_tape
from nightsplit.shared.errors import ConfigError, StateError
from nightsplit.shared.transport import Delivery
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.study import change, write_study
from tests.harness.workers import Hospital

SITES = ("north", "south", "east")


@pytest.fixture
def hospital(tmp_path):
    hospital = Hospital(tmp_path / "run", epochs=3)
    change(hospital.folder / "run.toml", "seed = 5", "seed = 5\ntape = true")
    change(hospital.folder / "run.toml", '"strict"', '"fair"')
    change(hospital.folder / "policy.toml", "server_sets", "tape = true\nserver_sets")
    yield hospital
    hospital.close()


def forge(path):
    """F8 of docs/explanation/attacks.md: other activations in the first batch of a tape, with a fitting sha256."""
    content, start = bytearray(path.read_bytes()), 0
    while True:
        _, of_names, of_body, _ = _HEAD.unpack_from(content, start)
        names = start + _HEAD.size
        body, end = names + of_names, names + of_names + of_body
        if b"smashed" in content[names:body]:
            break
        start = end
    tensors = body + 4 + int.from_bytes(content[body : body + 4], "big")
    for place in range(tensors + 64, end, 2):
        content[place] ^= 1  # the lowest bit of each value
    content[start + _HEAD.size - 32 : names] = sha256(content[names:end]).digest()
    path.write_bytes(content)


@pytest.mark.timeout(600)
def test_a_killed_run_is_replayed_on_the_command_line(hospital, capsys):
    for worker in ("server", *SITES):
        hospital.start(worker)
    for steps in (10, 30):
        hospital.wait_for_steps(steps, 150)
        hospital.kill("server")
        hospital.start("server")
    hospital.wait_for_end(250)
    file, tape = str(hospital.folder / "server.toml"), hospital.folder / "state" / "server" / FOLDER
    assert len(list(tape.glob("*.tape"))) == 3
    left = hospital.models()
    report = json.loads((hospital.folder / "report" / "report.json").read_text())

    done = hospital.call("replay", "server.toml", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads(done.stdout)
    assert (whole["equal"], whole["finished"]) == (True, True)
    assert whole["sha256"]["best"] == {"replayed": report["top_sha256"], "recorded": report["top_sha256"]}
    assert whole["position"] == sum(site["messages"] for site in report["sites"].values())
    assert whole["messages"] > whole["position"]

    assert run(["replay", file, "--until", "20", "--json"]) == 0
    early = json.loads(capsys.readouterr().out)
    assert (early["position"], early["finished"], early["equal"]) == (20, False, None)
    assert early["last"]["message"].startswith("lipids/")
    assert early["sha256"]["last"]["replayed"] != whole["sha256"]["last"]["replayed"]

    change(hospital.folder / "report" / "report.json", report["top_sha256"], "0" * 64)
    assert run(["replay", file]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"lipids: {whole['messages']} messages replayed, position {whole['position']}, the end of ")
    assert said.count(": equal\n") == 1
    assert said.count("NOT EQUAL") == 1
    change(hospital.folder / "report" / "report.json", "0" * 64, report["top_sha256"])

    forge(min(tape.glob("*.tape")))
    assert run(["replay", file]) == 1
    assert capsys.readouterr().out.count("NOT EQUAL") == 2

    for path in tape.glob("*.tape"):
        path.write_bytes(path.read_bytes()[:2000])
    assert run(["replay", file]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"E508 Tape is incomplete: {tape} ends at position ")
    assert err.count("\n") == 1
    assert hospital.models() == left


def test_what_a_user_is_told_without_a_tape(tmp_path, capsys):
    write_study(tmp_path)
    for file, number in (("server.toml", "E507 "), ("north.toml", "E103 ")):
        assert run(["replay", str(tmp_path / file)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(number)
        assert err.count("\n") == 1


def test_a_site_that_does_not_allow_it_refuses(hospital):
    SiteWorker(hospital.folder / "north.toml")
    change(hospital.folder / "policy.toml", "tape = true\n", "")
    with pytest.raises(ConfigError) as caught:
        SiteWorker(hospital.folder / "north.toml")
    assert caught.value.number == 108
    assert "needs tape = true (the server keeps every message of the run on its disk)" in caught.value.sentence


def test_a_full_disk_is_told_before_anything_is_acknowledged(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=True)
    try:
        tape, whole = Tape(disk / FOLDER), []

        def fill():
            for number in range(100):
                tape.write(Delivery("up", f"{number:03d}", bytes(6000)))
                tape.sync()
                whole.append(f"{number:03d}")

        with pytest.raises(StateError) as caught:
            fill()
        assert caught.value.number == 501
        names = len(json.dumps(["up", "000"]))
        assert f"the next entries need {44 + names + 6000} bytes" in caught.value.sentence
        with suppress(StateError):
            tape.close()
        assert 10 < len(whole) < 50
        assert [delivery.message_id for delivery in read_tape(disk / FOLDER, [])] == whole
    finally:
        subprocess.run(["umount", disk], check=True)
