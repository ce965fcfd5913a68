"""Runs with keys: what their broker can read, forge and repeat, with the real workers.

docs/explanation/attacks.md, rows A19, A20, B4, C7b, E3.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.topology import site_queues
from nightsplit.server_worker.worker import ServerWorker
from nightsplit.shared.transport import Confirmed, Queue
from nightsplit.shared.wire.format import encode
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message, Scalar
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.patterns import hits, scalars_in, seeded_patterns, tensors_in
from tests.harness.workers import SHARES, Hospital

IDLE_S = 0.5


def night(hospital: Hospital) -> None:
    """All sites work, and no server."""
    ServerWorker(hospital.folder / "server.toml").open_run()
    for site in SHARES:
        SiteWorker(hospital.folder / f"{site}.toml").work(IDLE_S)


def day(hospital: Hospital) -> ServerWorker:
    """The server works, and no site."""
    server = ServerWorker(hospital.folder / "server.toml")
    server.work(IDLE_S)
    return server


def bodies(folder: Path, *queues: str) -> Iterator[bytes]:
    with closing(sqlite3.connect(folder / "broker" / "broker.sqlite")) as rows:
        for queue, body, file in rows.execute("SELECT queue, body, file FROM message ORDER BY id"):
            if queue.endswith(queues):
                yield body if file is None else (folder / "broker" / "bodies" / file).read_bytes()


def test_a_broker_with_its_disk_reads_nothing_of_a_patient(tmp_path):
    plain = Hospital(tmp_path / "plain", epochs=2, keys=False)
    keyed = Hospital(tmp_path / "keyed", epochs=2)
    night(plain)
    night(keyed)
    sent = list(bodies(plain.folder, ".up"))
    patterns = seeded_patterns([tensors_in(body) for body in sent if b"smashed" in body[:200]], 200)
    patterns += scalars_in([body for body in sent if b"enrolled\xc3" in body], b"train", b"validation", b"test")
    assert len(patterns) >= 209  # the sites' numbers of patients are among them
    assert hits(patterns, plain.folder / "broker") == len(patterns)
    assert hits(patterns, keyed.folder / "broker") == 0
    day(plain)
    day(keyed)
    gradients = [tensors_in(body) for body in bodies(plain.folder, ".down") if b"cut_gradient" in body[:200]]
    answers = seeded_patterns(gradients, 200)
    assert hits(answers, plain.folder / "broker") == 200
    assert hits(patterns + answers, keyed.folder / "broker") == 0


def test_keys_do_not_show_in_the_model(tmp_path):
    with_keys = Hospital(tmp_path / "keyed", epochs=2).in_peace()
    assert with_keys == Hospital(tmp_path / "plain", epochs=2, keys=False).in_peace()
    assert not list(tmp_path.glob("keyed/state/*/run_keys/own.key"))  # deleted at the end


@pytest.mark.parametrize("keys", [True, False])
def test_a_recorded_run_does_not_complete_a_new_one(tmp_path, keys):
    """A20: a new run of the same file and identities, with the broker's content of an old one and no site alive."""
    old = Hospital(tmp_path / "old", epochs=2, keys=keys)
    night(old)
    new = tmp_path / "new"
    shutil.copytree(old.folder, new, ignore=shutil.ignore_patterns("state", "run.db*", "report"))
    old.folder = new
    server = day(old)
    applied = server._counters.counts["applied"]
    if keys:
        assert applied == 0
        assert {317} == refused_numbers(new)
    else:
        assert applied > 0  # the attack works where nothing is signed


def refused_numbers(folder: Path) -> set[int]:
    with closing(sqlite3.connect(folder / "broker" / "broker.sqlite")) as rows:
        headers = rows.execute("SELECT headers FROM message WHERE queue LIKE '%.dead'").fetchall()
    return {int(text.partition('"number": "')[2][:3]) for (text,) in headers}


def put(folder: Path, queue: Queue, kind: Kind, seq: int = 0, **scalars: Scalar) -> None:
    """Publish a message of the server to north, as someone with all rights at the broker."""
    header = Header("lipids", SERVER, "north", kind, seq)
    payload = SiteWorker(folder / "north.toml")  # its contract is public
    message = Message(header, {}, scalars)
    body = encode(message, contract_of(payload)[kind], 2**20)
    with EmbeddedBroker(folder / "broker").link([], 8, "administrator") as link:
        link.publish(queue, header.message_id, body)
        assert isinstance(link.receive(20), Confirmed)


def contract_of(worker: SiteWorker):
    from nightsplit.shared.protocols.build import build_model

    return build_model(worker.run_config, worker.run_folder).contract


def test_forged_words_of_the_server_are_refused_and_change_nothing(tmp_path):
    """B4, C7b, E3: finish and rejected by the broker's administrator, first in the queue and in the middle."""
    hospital = Hospital(tmp_path / "run", epochs=2)
    ServerWorker(hospital.folder / "server.toml").open_run()
    down = site_queues("lipids", "north", SiteWorker(hospital.folder / "north.toml").run_config.wire.queue_bytes).down
    for incarnation in ("", "north-1"):
        put(hospital.folder, down, Kind.REJECTED, incarnation=incarnation, number=601, reason="stop")
    put(hospital.folder, down, Kind.EXCLUDED, reason="stop")
    put(hospital.folder, down, Kind.NOTED, 1, best=0, judged=0)
    night(hospital)
    assert refused_numbers(hospital.folder) == {317}
    assert hospital.in_peace() == Hospital(tmp_path / "calm", epochs=2).in_peace()
