"""The events of a worker's log, and how they are written."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from nightsplit.console.ui import json_log
from nightsplit.shared.engine.order import Exclude
from nightsplit.shared.errors import BrokerError, ConfigError, DataError, RunError, StateError
from nightsplit.shared.log import event
from nightsplit.shared.protocols.handshake import PROGRESS
from nightsplit.shared.run_store.status import Phase, Presence, SiteStatus, WorkerStatus
from nightsplit.shared.transport import Blocked, Unblocked
from nightsplit.shared.wire import format as wire
from nightsplit.shared.wire.message import SERVER, Header, Kind, Message
from nightsplit.shared.wire.schema import Payload, TensorSpec
from tests.harness.night import Night, tiny_config


@pytest.fixture
def lines(capsys):
    """What was written to stderr since the last call, as objects."""
    json_log.switch(on=True)
    json_log.name("north", "ldl")
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    json_log.name(None, None)
    json_log.switch(on=False)


def test_a_line_has_time_level_worker_run_event_and_facts(lines):
    event("refused", logging.WARNING, number=306, sender="south", seq=None)
    (line,) = lines()
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning", "worker": "north", "run": "ldl", "event": "refused",
        "number": 306, "sender": "south", "seq": None,
    }  # fmt: skip


def test_nothing_is_written_unless_it_is_switched_on(capsys):
    event("refused", logging.WARNING, number=306)
    assert capsys.readouterr() == ("", "")


def test_errors_that_may_quote_a_file_or_a_cell_are_told_by_number(lines):
    json_log.failed(DataError(403, "erika_mueller.csv, row 7: 'secret' is no number.", "mend it."))
    json_log.failed(StateError(501, "/data/erika_mueller.png: no room.", "make room."))
    json_log.failed(ConfigError(104, "nets:make failed: could not convert '48.0,erika_mueller'.", "mend it."))
    json_log.failed(RunError(610, "erika_mueller has no gradient of single records.", "mend it."))
    json_log.failed(BrokerError(201, "host:5672: connection refused.", "start it."))
    told = lines()
    assert [line["number"] for line in told] == [403, 501, 104, 610, 201]
    assert [line["reason"] for line in told] == [None, None, None, None, "host:5672: connection refused."]
    assert told[0]["title"] == "Value cannot be read"
    assert {line["level"] for line in told} == {"error"}


def test_counts_are_told_now_and_then(lines):
    pulse = json_log.Pulse()
    for sent in (1, 2, 3):
        north = SiteStatus(applied=sent, presence=Presence(beat="ab12"))
        pulse.observe(WorkerStatus(phase=Phase.WORKING, digest="c0ffee", sent=sent, sites={"north": north}))
    assert lines() == [], "thirty seconds are not over"
    pulse.log()
    (line,) = lines()
    assert {name: line[name] for name in line.keys() - {"time", "level", "worker", "run"}} == {
        "event": "progress", "sent": 3, "sites": {"north": {"applied": 3}},
    }  # fmt: skip


def test_a_refused_message_is_told_by_number_sender_and_seq(lines, tmp_path: Path):
    night = Night(tiny_config(("north",)), tmp_path)
    night.work(SERVER, 0.1)
    payload = Payload(Kind.CUT_GRADIENT, {"gradient": TensorSpec(torch.float32, ("batch", 8), "fp16")}, PROGRESS)
    answer = Header("night", SERVER, "north", Kind.CUT_GRADIENT, 1, reply_to=1)
    short = Message(answer, {"gradient": torch.randn(3, 8)}, {"best": 0, "judged": 0})
    with night.broker.link([], 8, "somebody") as link:
        link.publish(night.queues["north"].down, "short", [b"".join(wire.encode(short, payload, 2**20))])
        link.publish(night.queues["north"].up, "junk", [b"erika mueller"])
    night.run()
    refused = [line for line in lines() if line["event"] == "refused"]
    assert [(line["number"], line["sender"], line["seq"]) for line in refused] == [
        (301, "north", None),
        (306, SERVER, 1),
    ]


def test_a_site_that_is_left_out_is_told_with_its_place(lines, tmp_path: Path):
    night = Night(tiny_config(("north", "south"), quorum=1), tmp_path)
    night.decide = lambda: None if night.server.excluded else Exclude("south")
    night.start(SERVER)
    night.step(SERVER)
    (line,) = [line for line in lines() if line["event"] == "site_excluded"]
    assert line["site"] == "south"
    assert line["position"] == 1
    assert line["level"] == "warning"


def test_trouble_is_told_when_it_begins_and_when_it_is_over(lines, tmp_path: Path):
    night = Night(tiny_config(("north",)), tmp_path)
    engine = night.start(SERVER)
    events = iter([Blocked("the publishing connection is down"), Unblocked()])
    receive = engine._link.receive
    engine._link.receive = lambda timeout: next(events, None) or receive(timeout)
    engine.step(0.0)
    assert [(line["event"], line.get("reason")) for line in lines()] == [
        ("blocked", "the publishing connection is down"), ("recovered", None),
    ]  # fmt: skip
