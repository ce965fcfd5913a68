"""Dead letters that are replayed: the run ends as if they had never been refused, over every broker."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import msgspec
import pika
import pytest

from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.console.dead_letters import PREFETCH, replay_letters
from nightsplit.shared.errors import ConfigError, NightsplitError
from nightsplit.shared.transport import Delivery
from nightsplit.shared.wire import head
from nightsplit.shared.wire.message import SERVER
from tests.harness.dead_letters import (
    BROKERS,
    contents,
    depth,
    file_of,
    letters,
    listed,
    put,
)
from tests.harness.kills import is_killed
from tests.harness.night import Night, tiny_config
from tests.harness.services import wait_until
from tests.harness.study import change
from tests.protocols.test_poison import POISON, header


def start_all(night: Night) -> None:
    for worker in night.workers:
        night.start(worker)


def finish(night: Night) -> None:
    deadline = time.monotonic() + 90
    while night.engines:
        assert time.monotonic() < deadline, {name: engine.marks for name, engine in night.engines.items()}
        for name in list(night.engines):
            night.step(name)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> str:
    """What `night` ends with when nobody disturbs it."""
    night = Night(tiny_config(("north", "south"), epochs=2, window=1000), tmp_path_factory.mktemp("calm"))
    night.run()
    return night.fingerprint()


def sent_all(night: Night) -> int:
    """The run is open and the sites have sent all they have; how many messages that is."""
    night.work(SERVER, 0.1)
    for site in night.config.run.sites:
        night.work(site)
    return sum(night.broker.depth(queues.up) for queues in night.queues.values())


def test_what_another_version_refused_is_replayed_and_the_run_ends_bit_identical(night, calm, capsys, monkeypatch):
    sent = sent_all(night)
    with monkeypatch.context() as another:
        another.setattr(head, "WIRE_VERSION", 2)
        # It has nothing to do but to save, so that what was refused is acknowledged.
        night.checkpoints[SERVER].interval_seconds = -1
        engine = night.start(SERVER)
        counts = engine.counters.counts
        wait_until(lambda: not engine.step(0.1) and counts["refused"] == sent, 60, "every message to be refused")
        unacked = engine._unacked
        wait_until(lambda: not engine.step(0.1) and not (engine._dirty or unacked.has_sealed), 30, "checkpoints")
        night.kill(SERVER)
    for queues in night.queues.values():
        depth(night, queues.up, 0)
    found = listed(file_of(night), capsys)
    assert [letter["number"] for letter in found] == [302] * sent

    replay_letters(file_of(night, "north"), None)
    replay_letters(file_of(night), [letter["id"] for letter in listed(file_of(night), capsys)])
    assert listed(file_of(night), capsys) == []
    start_all(night)
    finish(night)
    assert night.fingerprint() == calm
    assert night.roles[SERVER].refusals == {}


def test_what_the_hospital_no_longer_lets_out_stays(night, capsys):
    """Its letters were sent once; since then the hospital keeps labels to itself."""
    sent_all(night)
    queues = night.queues["north"]
    _, batch = first_batch(night)
    put(night, queues.dead, (f"dead/{batch.message_id}/1", batch.body, {"queue": queues.up.name, "number": "302"}))
    before, north = night.broker.depth(queues.up), file_of(night, "north")
    change(night.folder / "policy.toml", '"labels", ', "")
    with pytest.raises(ConfigError, match='needs "labels" in allowed'):
        replay_letters(north, None)
    depth(night, queues.up, before)
    assert [letter["message_id"] for letter in listed(file_of(night), capsys)] == [batch.message_id]


def first_batch(night: Night) -> tuple[int, Delivery]:
    """Place in the queue, and the message that the server waits for first."""
    up = night.queues["north"].up
    for place, delivery in enumerate(contents(night, up, night.broker.depth(up))):
        if head.read_head(delivery.body).header.seq == 1:
            return place, delivery
    raise AssertionError("no first batch")


def test_one_letter_is_replayed_behind_a_backlog_larger_than_the_prefetch(night, calm, capsys):
    sent_all(night)
    up, dead = night.queues["north"].up, night.queues["north"].dead
    place, batch = first_batch(night)
    with night.broker.link([up], 64, "thief") as link:
        taken = []
        while len(taken) <= place:
            if isinstance(event := link.receive(5.0), Delivery):
                taken.append(event)
        put(night, dead, (f"dead/{batch.message_id}/1", batch.body, {"queue": up.name, "number": "302"}))
        link.acknowledge(taken[place])
    night.start(SERVER)  # alone: a site would send the batch again
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        night.step(SERVER)
    assert night.roles[SERVER].applied == {"north": 0, "south": 0}, "nothing was missing"

    (letter,) = listed(file_of(night), capsys)
    assert letter["message_id"] == batch.message_id
    replay_letters(file_of(night), [letter["id"]])
    for site in night.config.run.sites:
        night.start(site)
    finish(night)
    assert night.fingerprint() == calm


@pytest.mark.rabbitmq
def test_what_the_broker_itself_moved_is_replayed(rabbitmq, calm, tmp_path, capsys):
    """A limit in a broker's policy makes dead letters without our headers."""
    url = rabbitmq.vhost()
    config = tiny_config(("north", "south"), epochs=2, window=1000)
    night = Night(config, tmp_path, RabbitBroker(url), prefetch=8)
    sent_all(night)
    up = night.queues["north"].up
    waiting = night.broker.depth(up)
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.basic_qos(prefetch_count=1)
        for number, (method, _, _) in enumerate(channel.consume(up.name), 1):
            channel.basic_reject(method.delivery_tag, requeue=False)
            if number == waiting:
                break
    depth(night, night.queues["north"].dead, waiting)
    found = listed(file_of(night), capsys)
    assert {(letter["reason"], letter["queue"], letter["number"]) for letter in found} == {("rejected", up.name, None)}
    replay_letters(file_of(night), None)
    start_all(night)
    finish(night)
    assert night.fingerprint() == calm


def test_a_counted_letter_that_is_replayed_is_a_duplicate(broker, tmp_path, capsys):
    """As the help says: refusing counts as applying."""
    night = Night(tiny_config(("north",), epochs=1, window=1), tmp_path, broker)
    start_all(night)
    while night.roles[SERVER].applied["north"] < 2:
        for engine in night.engines.values():
            engine.step(0.01)
    q = night.roles["north"].next_seq
    put(night, night.queues["north"].up, ("poison", POISON["a tensor of another name"][0](header(q)), {}))
    finish(night)
    (letter,) = listed(file_of(night), capsys)
    assert (letter["number"], night.roles[SERVER].refusals) == (304, {"north": 1})
    age = datetime.now(UTC) - datetime.fromisoformat(letter["time"])
    assert timedelta(0) <= age < timedelta(minutes=5)

    replay_letters(file_of(night), [letter["id"]])
    engine = night.start(SERVER)
    wait_until(lambda: engine.step(0.1) and engine.counters.counts["duplicates"] > 0, 30, "a duplicate")
    assert night.roles[SERVER].refusals == {"north": 1}
    night.kill(SERVER)
    assert listed(file_of(night), capsys) == []


def test_a_full_queue_is_an_error_and_loses_nothing(broker, tmp_path, capsys):
    config = tiny_config(("north",))
    small = msgspec.structs.replace(config, wire=msgspec.structs.replace(config.wire, queue_bytes=150_000))
    night = Night(small, tmp_path, broker)
    put(night, night.queues["north"].dead, *letters(night, 12))
    with pytest.raises(NightsplitError, match=r"E209 .*is full"):
        replay_letters(file_of(night), None)
    up = contents(night, night.queues["north"].up, night.broker.depth(night.queues["north"].up))
    dead = contents(night, night.queues["north"].dead, night.broker.depth(night.queues["north"].dead))
    dead = [letter for letter in dead if letter.message_id.startswith("dead/")]
    assert {letter.body for letter in (*up, *dead)} == {body for _, body, _ in letters(night, 12)}
    assert up
    assert dead


@pytest.mark.parametrize("broker", BROKERS[1:], indirect=True)
@pytest.mark.parametrize("method", ["publish", pytest.param("acknowledge", marks=pytest.mark.campaign)])
def test_a_command_that_is_killed_loses_nothing(night, method, capsys):
    up, dead, number = night.queues["north"].up, night.queues["north"].dead, 40
    put(night, dead, *letters(night, number))
    assert is_killed(lambda: replay_letters(file_of(night), None), method, 7)
    replayed = [message.message_id for message in contents(night, up, night.broker.depth(up))]
    left = [letter["message_id"] for letter in listed(file_of(night), capsys)]  # waits for the dead one's lease
    everything = [f"night/north/server/smashed/{n}" for n in range(number)]
    assert {*left, *replayed} == {*everything}, "none is lost"
    # Confirms may overtake each other, so one is acknowledged before an earlier one; their order stays.
    assert left == [letter for letter in everything if letter in left]
    assert replayed == everything[: len(replayed)]
    assert number - PREFETCH <= len(left) <= number

    replay_letters(file_of(night), None)
    assert listed(file_of(night), capsys) == []
    depth(night, up, len(replayed) + len(left))
