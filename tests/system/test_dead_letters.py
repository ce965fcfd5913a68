"""Dead letters: what nightsplit dlq shows and does, over every broker."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import msgspec
import pika
import pytest

from broker.base import Broker, Delivery, Queue
from broker.embedded import EmbeddedBroker
from broker.embedded_link import EmbeddedLink
from broker.memory import MemoryBroker
from broker.rabbitmq import RabbitBroker
from broker.rabbitmq_link import RabbitLink
from console import dead_letters
from console.dead_letters import FEW, discard_letters, list_letters, replay_letters, show_letter
from console.files import WorkerFile
from shared import wire
from shared.config import ServerSection, SiteSection
from shared.crash import EXIT_CODE
from shared.errors import NightsplitError
from shared.message import SERVER
from tests.protocols.night import Night, tiny_config
from tests.protocols.test_poison import POISON, header
from tests.services import wait_until

BROKERS = ["memory", "embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)]


@pytest.fixture(params=BROKERS)
def broker(request, tmp_path) -> Broker:
    if request.param == "memory":
        return MemoryBroker()
    if request.param == "embedded":
        return EmbeddedBroker(tmp_path / "broker")
    return RabbitBroker(request.getfixturevalue("rabbitmq").vhost())


@pytest.fixture
def night(broker, tmp_path) -> Night:
    """A run whose sites send all they have without waiting: more than a prefetch."""
    return Night(tiny_config(("north", "south"), epochs=2, window=1000), tmp_path, broker, prefetch=8)


def file_of(night: Night, site: str | None = None) -> WorkerFile:
    """As a worker's file names it; the broker is the night's own."""

    class Here(WorkerFile):
        def broker(self) -> Broker:
            return night.broker

    place = {"broker": "embedded:broker", "store": "sqlite:run.db"}
    worker = ServerSection(**place) if site is None else SiteSection(name=site, **place)
    return Here(Path("worker.toml"), worker, None, night.config)


def listed(file: WorkerFile, capsys) -> list[dict]:
    capsys.readouterr()
    list_letters(file, as_json=True)
    return json.loads(capsys.readouterr().out)["dead_letters"]


def put(night: Night, queue: Queue, *messages: tuple[str, bytes, dict[str, str]]) -> None:
    """Publish (id, body, headers), and wait for the confirms."""
    with night.broker.link([], 8, "somebody") as link:
        for message in messages:
            link.publish(queue, message[0], [message[1]], message[2])
        while link.unconfirmed:
            link.receive(0.1)


def letters(night: Night, number: int, site: str = "north") -> list[tuple[str, bytes, dict[str, str]]]:
    """As an engine writes them; every third one so large that the embedded broker gives it a file."""
    origin = night.queues[site].up.name
    return [
        (
            f"dead/night/{site}/server/smashed/{n}/1",
            b"%d" % n + bytes(70_000 if n % 3 == 2 else 100),
            {
                "number": "306", "reason": "E306 Tensor has an unexpected shape: it is odd. Fix: mend it. (page)",
                "sender": site, "queue": origin, "time": "2026-03-01T22:00:00+00:00",
            },
        )
        for n in range(number)
    ]  # fmt: skip


def contents(night: Night, queue: Queue, number: int) -> list[Delivery]:
    """The first messages of a queue; they stay where they are."""
    found: list[Delivery] = []
    with night.broker.link([queue], number + 1, "reader") as link:
        deadline = time.monotonic() + 30
        while len(found) < number:
            assert time.monotonic() < deadline, f"{len(found)} of {number}"
            event = link.receive(0.2)
            if isinstance(event, Delivery):
                found.append(event)
        assert link.receive(0.2) is None
    return found


def depth(night: Night, queue: Queue, expected: int) -> None:
    wait_until(lambda: night.broker.depth(queue) == expected, 30, f"{expected} messages in {queue.name}")


def start_all(night: Night) -> None:
    for worker in (SERVER, *night.config.run.sites):
        night.start(worker).start()


def finish(night: Night) -> None:
    deadline = time.monotonic() + 90
    while night.engines:
        assert time.monotonic() < deadline, {name: engine.marks for name, engine in night.engines.items()}
        for name, engine in list(night.engines.items()):
            engine.step(0.0)
            if engine.finished:
                engine.leave()
                night.kill(name)


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> str:
    """What `night` ends with when nobody disturbs it."""
    night = Night(tiny_config(("north", "south"), epochs=2, window=1000), tmp_path_factory.mktemp("calm"))
    night.together()
    return night.fingerprint()


# ── replay ──────────────────────────────────────────────────────────────────────────────────────


def sent_all(night: Night) -> int:
    """The run is open and the sites have sent all they have; how many messages that is."""
    night.work(SERVER, 0.1)
    for site in night.config.run.sites:
        night.work(site)
    return sum(night.broker.depth(queues.up) for queues in night.queues.values())


def test_what_another_version_refused_is_replayed_and_the_run_ends_bit_identical(night, calm, capsys, monkeypatch):
    sent = sent_all(night)
    with monkeypatch.context() as another:
        another.setattr(wire, "WIRE_VERSION", 2)
        engine = night.start(SERVER)
        engine._interval = 0.05  # it has nothing to do but to save, so that what was refused is acknowledged
        engine.start()
        counts = engine.progress.counts
        wait_until(lambda: not engine.step(0.1) and counts["refused"] == sent, 60, "every message to be refused")
        wait_until(lambda: not engine.step(0.1) and not (engine._dirty or engine._applied.sealed), 30, "checkpoints")
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


def first_batch(night: Night) -> tuple[int, Delivery]:
    """Place in the queue, and the message that the server waits for first."""
    up = night.queues["north"].up
    for place, delivery in enumerate(contents(night, up, night.broker.depth(up))):
        if wire.peek(delivery.body).seq == 1:
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
    start_all(night)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        for engine in night.engines.values():
            engine.step(0.0)
    assert night.roles[SERVER].applied == {"north": 0, "south": 0}, "nothing was missing"

    (letter,) = listed(file_of(night), capsys)
    assert letter["message_id"] == batch.message_id
    replay_letters(file_of(night), [letter["id"]])
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
    engine.start()
    wait_until(lambda: engine.step(0.1) and engine.progress.counts["duplicates"] > 0, 30, "a duplicate")
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


def die_in_the_middle(method: str, act: Callable[[], None]) -> None:
    """Carry out `act` in a process that ends without a word when a link's `method` is called for the 7th time."""
    child = os.fork()
    if child == 0:
        calls = count(1)

        def dying(original: Callable[..., None]) -> Callable[..., None]:
            return lambda *arguments: os._exit(EXIT_CODE) if next(calls) == 7 else original(*arguments)

        for kind in (EmbeddedLink, RabbitLink):
            setattr(kind, method, dying(getattr(kind, method)))
        act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == EXIT_CODE


@pytest.mark.parametrize("broker", BROKERS[1:], indirect=True)
@pytest.mark.parametrize("method", ["publish", "acknowledge"])
def test_a_command_that_is_killed_loses_nothing(night, method, capsys):
    up, dead, number = night.queues["north"].up, night.queues["north"].dead, 40
    put(night, dead, *letters(night, number))
    die_in_the_middle(method, lambda: replay_letters(file_of(night), None))
    replayed = [message.message_id for message in contents(night, up, night.broker.depth(up))]
    left = [letter["message_id"] for letter in listed(file_of(night), capsys)]  # waits for the dead one's lease
    everything = [f"night/north/server/smashed/{n}" for n in range(number)]
    assert left == everything[-len(left) :]
    assert replayed == everything[: len(replayed)]
    assert number - FEW <= len(left) <= number
    assert len(left) + len(replayed) >= number

    replay_letters(file_of(night), None)
    assert listed(file_of(night), capsys) == []
    depth(night, up, len(replayed) + len(left))


# ── list, show, discard ─────────────────────────────────────────────────────────────────────────


def test_a_list_reads_through_and_changes_nothing(night, capsys):
    number = 300
    put(night, night.queues["north"].dead, *letters(night, number))
    put(night, night.queues["south"].dead, *letters(night, 2, "south"))
    first = listed(file_of(night), capsys)
    assert [(letter["site"], letter["message_id"]) for letter in first] == [
        *(("north", f"night/north/server/smashed/{n}") for n in range(number)),
        *(("south", f"night/south/server/smashed/{n}") for n in range(2)),
    ]
    assert first[2] == {
        "id": first[2]["id"], "site": "north", "number": 306, "sender": "north", "time": "2026-03-01T22:00:00+00:00",
        "reason": "E306 Tensor has an unexpected shape: it is odd. Fix: mend it. (page)", "size": 70_001,
        "queue": night.queues["north"].up.name, "message_id": "night/north/server/smashed/2",
    }  # fmt: skip
    assert len({letter["id"] for letter in first}) == number + 2
    assert listed(file_of(night), capsys) == first
    assert listed(file_of(night, "north"), capsys) == first[:number]
    assert listed(file_of(night, "south"), capsys) == first[number:]
    depth(night, night.queues["north"].dead, number)

    discard_letters(file_of(night), [first[7]["id"], first[150]["id"]])
    assert capsys.readouterr().out == "2 dead letters discarded\n"
    assert listed(file_of(night), capsys) == [letter for n, letter in enumerate(first) if n not in (7, 150)]
    discard_letters(file_of(night, "south"), None)
    assert listed(file_of(night), capsys) == [letter for n, letter in enumerate(first[:number]) if n not in (7, 150)]
    discard_letters(file_of(night), None)
    assert capsys.readouterr().out == "298 dead letters discarded\n"
    list_letters(file_of(night), as_json=False)
    assert capsys.readouterr().out == "0 dead letters\n"


def test_ids_that_are_not_there(night, capsys):
    put(night, night.queues["north"].dead, *letters(night, 3))
    ids = [letter["id"] for letter in listed(file_of(night), capsys)]
    with pytest.raises(NightsplitError, match="E606 No such dead letter: abc, def is not here; 2 of the others were"):
        discard_letters(file_of(night), ["abc", ids[2], "def", ids[0]])
    assert [letter["id"] for letter in listed(file_of(night), capsys)] == [ids[1]]
    with pytest.raises(NightsplitError, match="E606"):
        show_letter(file_of(night), "abc", as_json=False)
    with pytest.raises(NightsplitError, match="E606"):
        show_letter(file_of(night, "south"), ids[1], as_json=False)
    with pytest.raises(NightsplitError, match="E602"):
        list_letters(file_of(night, "west"), as_json=False)


def test_a_letter_that_names_no_queue_of_its_site_goes_nowhere(night, capsys):
    night.broker.declare([replace(night.queues["south"].up, name="elsewhere", key="elsewhere")])
    for origin in ({}, {"queue": night.queues["south"].up.name}, {"queue": "elsewhere"}):
        put(night, night.queues["north"].dead, ("x", b"body", origin))
        for chosen in (None, [letter["id"] for letter in listed(file_of(night), capsys)]):
            with pytest.raises(NightsplitError, match="E607"):
                replay_letters(file_of(night), chosen)
        discard_letters(file_of(night), None)
    depth(night, night.queues["south"].up, 0)


def test_show_tells_all_but_the_values(night, capsys):
    bodies = [POISON["NaN"][0](header(5)), b"\x1b[2Jnothing of ours"]
    around = {"number": "307", "reason": "E307 x: y. Fix: z.", "queue": "\x1b[31mred\n"}
    put(night, night.queues["north"].dead, *((f"dead/m{n}/1", body, around) for n, body in enumerate(bodies)))
    first, second = (letter["id"] for letter in listed(file_of(night), capsys))

    show_letter(file_of(night), first, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["letter"]["id"] == first
    assert shown["headers"] == around
    assert shown["message"] == {
        "run": "night", "sender": "north", "receiver": "server", "kind": "smashed", "seq": 5, "reply_to": 0,
        "version": 4, "fence": 0,
    }  # fmt: skip
    show_letter(file_of(night), first, as_json=False)
    plain = capsys.readouterr().out
    assert "message seq          5\n" in plain
    assert "\x1b" not in plain

    show_letter(file_of(night), second, as_json=False)
    plain = capsys.readouterr().out
    assert "message header       E301 Not a nightsplit message" in plain
    assert "header queue         ?[31mred?\n" in plain
    list_letters(file_of(night), as_json=False)
    assert "\x1b" not in capsys.readouterr().out


def test_the_queue_is_in_use(night, capsys, monkeypatch):
    put(night, night.queues["north"].dead, *letters(night, 3))
    monkeypatch.setattr(dead_letters, "PATIENCE_S", 0.5)
    with night.broker.link([night.queues["north"].dead], 8, "another command") as link:
        wait_until(lambda: isinstance(link.receive(0.1), Delivery), 10, "its first letter")
        with pytest.raises(NightsplitError, match="E210"):
            list_letters(file_of(night), as_json=True)
    monkeypatch.setattr(dead_letters, "PATIENCE_S", 30.0)
    assert len(listed(file_of(night), capsys)) == 3  # and the bookmark that stayed is no letter
    depth(night, night.queues["north"].dead, 3)


def test_more_letters_than_one_prefetch_holds(night, capsys, monkeypatch):
    put(night, night.queues["north"].dead, *letters(night, 5))
    everything = listed(file_of(night), capsys)
    with monkeypatch.context() as fewer:
        fewer.setattr(dead_letters, "MOST", 3)
        list_letters(file_of(night), as_json=True)
        found = json.loads(capsys.readouterr().out)
        assert (found["complete"], found["dead_letters"]) == (False, everything[:3])
        list_letters(file_of(night), as_json=False)
        assert capsys.readouterr().out.endswith("3 dead letters; there are more behind the oldest 3 of a site\n")
    replay_letters(file_of(night), None)
    assert listed(file_of(night), capsys) == []
    assert [message.body for message in contents(night, night.queues["north"].up, 5)] == [
        body for _, body, _ in letters(night, 5)
    ]
