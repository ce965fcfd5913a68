"""Encrypted queries to a trained model: site and server never online together, deaths, and what nobody may find."""

from __future__ import annotations

import csv
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from nightsplit.console.cli import run
from nightsplit.console.demo.play_queries import play_queries
from nightsplit.console.status import summarise
from nightsplit.console.worker_file import WorkerFile
from nightsplit.shared.errors import TITLES
from nightsplit.shared.protocols.load import load_run
from tests.harness.approvals import approve_all
from tests.harness.films import (  # fmt: skip
    FRAMES,
    SEQUENCES,
    ask_under_kills,
    by_itself,
    expect_plain_scores,
    scores,
    trained,
    write_study,
)
from tests.harness.services import RabbitNode

KILLS = 8


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("recurrent", [False, True], ids=["one_shot", "refresh"])
def test_site_and_server_are_never_online_together(recurrent: bool, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "film", recurrent)
    asked_in_turn(folder, recurrent)
    expect_no_secret(folder)


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_the_demo_asks_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "film", recurrent=False)
    trained(folder)
    asked = play_queries(folder, load_run(folder / "run.toml"), Console(width=200))
    assert asked is not None
    assert asked.sequences == SEQUENCES // 5
    assert asked.auc == asked.plain_auc
    assert 0 < asked.difference < 1e-4
    assert asked.decisions == 0
    assert capsys.readouterr().out.count("sites are offline; the server answered without a key") == 1


@pytest.mark.rabbitmq
@pytest.mark.timeout(300)
def test_over_rabbitmq(rabbitmq: RabbitNode, tmp_path: Path) -> None:
    asked_in_turn(write_study(tmp_path / "film", True, rabbitmq.vhost()), recurrent=True)


def asked_in_turn(folder: Path, recurrent: bool) -> None:
    """A run is trained, and its model is asked; nobody is there while anybody else is."""
    trained(folder)
    by_itself(folder, "serve-queries")  # makes the queues
    output = str(folder / "scores.csv")
    by_itself(folder, "query", "--submit", "--output", output)
    assert scores(folder / "scores.csv", "logit") == {}
    assert summarise(WorkerFile(folder / "server.toml"))["queries"]["north"] == {"ask": 2, "answer": 0}
    for _ in range(FRAMES if recurrent else 1):
        by_itself(folder, "serve-queries")
        by_itself(folder, "query", "--output", output)
    expect_plain_scores(folder)


def expect_no_secret(folder: Path) -> None:
    """No part of the secret key's file is in what the broker, the server or the run store hold."""
    secret = (folder / "state" / "north" / "keys" / "secret.key").read_bytes()
    parts = [secret[n : n + 32] for n in range(64, len(secret) - 32, 4096)]
    places = [path for place in ("broker", "state/server", "report") for path in (folder / place).rglob("*")]
    files = [path for path in [*places, folder / "run.db"] if path.is_file()]
    assert any("keys" in path.parts for path in files), "the public keys came"
    for path in files:
        content = path.read_bytes()
        assert not any(part in content for part in parts), path


@pytest.mark.campaign
@pytest.mark.timeout(400)
def test_either_side_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "film", recurrent=True)
    trained(folder)
    by_itself(folder, "serve-queries")
    died = ask_under_kills(folder, KILLS, seed=5, pause=4.0)
    assert died.total() == KILLS
    assert set(died) == {"server", "site"}
    assert expect_plain_scores(folder) >= 1, "submissions with every score once"


# -- what a user can get wrong ---------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], number: int, *arguments: str) -> str:
    capsys.readouterr()
    assert run(arguments) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"E{number} {TITLES[number]}: "), err
    assert "Traceback" not in out + err
    return err


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_study(tmp_path / "film", recurrent=False)
    north, server = str(folder / "north.toml"), str(folder / "server.toml")
    assert "the run has not finished here" in refused(capsys, 605, "query", north, "--submit")
    assert "the run has not finished here" in refused(capsys, 605, "serve-queries", server)
    (folder / "policy.toml").write_text('allowed = ["labels", "activations", "counts"]\n')
    assert '"ciphertext" in allowed' in refused(capsys, 108, "query", north, "--submit")
    (folder / "policy.toml").write_text('allowed = ["labels", "activations", "counts", "ciphertext"]\n')
    text = (folder / "run.toml").read_text()
    plain = text.replace("nightsplit.models:clstm", "benchmarks.accuracy.plain_clstm:plain_clstm")
    (folder / "run.toml").write_text(plain.replace(", recurrent = false", ""))
    assert "cannot work on ciphertexts" in refused(capsys, 105, "serve-queries", server)
    (folder / "run.toml").write_text(text.replace(f"frames = {FRAMES}", "frames = 15"))
    approve_all(folder)
    assert "may have 14 frames, the model takes 15" in refused(capsys, 105, "query", north)


def test_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not changed under an open query; without the secret one nothing is sent."""
    folder = write_study(tmp_path / "film", recurrent=False)
    trained(folder)
    by_itself(folder, "serve-queries")
    by_itself(folder, "query", "--submit", "--output", str(folder / "scores.csv"))
    capsys.readouterr()
    assert run(["status", str(folder / "server.toml")]) == 0
    assert "encrypted queries of north: 2 messages for the server, 0 for the site" in capsys.readouterr().out
    north, keys = str(folder / "north.toml"), folder / "state" / "north" / "keys"
    before = (keys / "secret.key").read_bytes()
    assert "1 queries" in refused(capsys, 512, "query", north, "--new-keys")
    assert (keys / "secret.key").read_bytes() == before
    (keys / "secret.key").rename(keys / "elsewhere")
    refused(capsys, 511, "query", north)
    blinding = folder / "state" / "server" / "blinding.key"
    blinding.chmod(0o640)
    assert "may be read by other users" in refused(capsys, 511, "serve-queries", str(folder / "server.toml"))
    blinding.chmod(0o600)
    (keys / "elsewhere").rename(keys / "secret.key")
    by_itself(folder, "serve-queries")
    by_itself(folder, "query", "--output", str(folder / "scores.csv"))
    by_itself(folder, "query", "--new-keys", "--submit", "--output", str(folder / "scores.csv"))
    assert (keys / "secret.key").read_bytes() != before
    assert (keys / "secret.key").stat().st_mode & 0o777 == 0o600
    by_itself(folder, "serve-queries")
    by_itself(folder, "query", "--output", str(folder / "again.csv"))
    with (folder / "again.csv").open() as file:
        rows = list(csv.DictReader(file))
    first, second = ([row["probability"] for row in rows if row["submission"] == number] for number in "12")
    assert np.array(first, float) == pytest.approx(np.array(second, float), abs=1e-4)
    assert len(first) == SEQUENCES // 5
