"""The embedded broker under processes that are killed, stopped, or in each other's way."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Confirmed, Queue, Unblocked
from tests.harness.embedded import DEAD, LARGE, UP, body, files, ids, rows, store, take
from tests.harness.services import wait_until

OTHER = Queue("night.south.up", "night.south", "up", None, DEAD)
LEASE_SECONDS = 1.5

Spawn = Callable[..., tuple[SpawnProcess, Connection]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "broker"


@pytest.fixture
def broker(folder: Path) -> EmbeddedBroker:
    broker = EmbeddedBroker(folder)
    broker.declare([UP, OTHER])
    return broker


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start `work(connection, *arguments)` in a process; whatever is left at the end is killed."""
    context = multiprocessing.get_context("spawn")
    started: list[tuple[SpawnProcess, Connection]] = []

    def start(work: Callable[..., None], *arguments: object) -> tuple[SpawnProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, *arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
        return process, ours

    yield start
    for process, connection in started:
        process.kill()
        process.join()
        process.close()
        connection.close()


def publish(connection: Connection, folder: Path, queue: Queue, count: int) -> None:
    """Publish messages 0, 1, 2..., eight at a time, and tell the id of each that is confirmed."""
    with EmbeddedBroker(folder).link([], 8, f"publisher of {queue.name}") as link:
        published = confirmed = 0
        while confirmed < count:
            while published < min(count, confirmed + 8):
                content = body(published)
                link.publish(queue, str(published), [content[:100], memoryview(content)[100:]])
                published += 1
            event = link.receive(10)
            assert isinstance(event, Confirmed)
            confirmed += 1
            connection.send(event.message_id)


def consume(connection: Connection, folder: Path, owner: str, count: int, acknowledge: int, ttl: float) -> None:
    """Take `count` messages, acknowledge the first few, say so; on a word from outside, the others."""
    with EmbeddedBroker(folder, lease_seconds=ttl).link([UP], 100, owner) as link:
        deliveries = take(link, count)
        for delivery in deliveries[:acknowledge]:
            link.acknowledge(delivery)
        connection.send([delivery.message_id for delivery in deliveries])
        connection.recv()
        try:
            for delivery in deliveries[acknowledge:]:
                link.acknowledge(delivery)
            while link.receive(10) is not None:
                pass
            connection.send(None)
        except BrokerError as error:
            connection.send(error.number)


def declare(connection: Connection, folder: Path) -> None:
    EmbeddedBroker(folder).declare([UP, OTHER])
    connection.send("declared")


@pytest.mark.parametrize("confirms", [1, 20, 75])
def test_what_was_confirmed_survives_a_killed_publisher(
    confirms: int, broker: EmbeddedBroker, folder: Path, spawn: Spawn
) -> None:
    process, connection = spawn(publish, folder, UP, 10_000)
    told = [connection.recv() for _ in range(confirms)]
    process.kill()
    process.join()
    try:
        while True:
            told.append(connection.recv())
    except (EOFError, ConnectionResetError):
        pass
    broker.declare([UP])
    stored = rows(folder)
    assert stored >= len(told)
    assert files(folder) == sum(1 for number in range(stored) if len(body(number)) == LARGE), "no orphans"
    with broker.link([UP], stored + 1, "server") as link:
        deliveries = take(link, stored)
        assert link.receive(0.1) is None
    assert ids(deliveries) == list(range(stored)), "in order, without gaps"
    assert all(delivery.body == body(int(delivery.message_id)) for delivery in deliveries)


def test_a_restart_gets_a_killed_consumers_messages_at_once_and_in_order(
    broker: EmbeddedBroker, folder: Path, spawn: Spawn
) -> None:
    store(broker, 10)
    process, connection = spawn(consume, folder, "server", 6, 2, 60.0)
    assert connection.recv() == list("012345")
    wait_until(lambda: rows(folder) == 8, 10, "the acknowledgements to be written")
    process.kill()
    process.join()
    began = time.monotonic()
    with broker.link([UP], 100, "server") as link:
        deliveries = take(link, 8)
    assert time.monotonic() - began < 5, "the lease of 60 s did not matter"
    assert ids(deliveries) == list(range(2, 10))
    assert [delivery.redelivered for delivery in deliveries] == [True] * 4 + [False] * 4
    assert [delivery.body for delivery in deliveries] == [body(number) for number in range(2, 10)]


def test_another_owner_waits_until_a_killed_consumers_lease_has_run_out(
    broker: EmbeddedBroker, folder: Path, spawn: Spawn
) -> None:
    store(broker, 3)
    process, connection = spawn(consume, folder, "server-a", 2, 0, 3.0)
    connection.recv()
    process.kill()
    process.join()
    with EmbeddedBroker(folder, lease_seconds=3.0).link([UP], 100, "server-b") as link:
        assert link.receive(1.0) is None
        assert ids(take(link, 3)) == [0, 1, 2]


def test_another_owner_follows_at_once_when_the_first_closes(broker: EmbeddedBroker) -> None:
    store(broker, 3)
    first = broker.link([UP], 100, "server-a")
    take(first, 2)
    with broker.link([UP], 100, "server-b") as second:
        assert second.receive(0.3) is None
        first.close()
        began = time.monotonic()
        assert ids(take(second, 3)) == [0, 1, 2]
        assert time.monotonic() - began < 5


def test_a_long_computation_keeps_the_lease(folder: Path) -> None:
    broker = EmbeddedBroker(folder, lease_seconds=LEASE_SECONDS)
    broker.declare([UP])
    store(broker, 2)
    with broker.link([UP], 1, "server-a") as busy, broker.link([UP], 100, "server-b") as waiting:
        (held,) = take(busy, 1)
        time.sleep(2 * LEASE_SECONDS)
        assert waiting.receive(0) is None
        busy.acknowledge(held)
        assert ids(take(busy, 1)) == [1]


def test_a_second_worker_of_the_same_name_ends_the_first(broker: EmbeddedBroker, folder: Path) -> None:
    store(broker, 2)
    with broker.link([UP], 100, "server") as first:
        deliveries = take(first, 2)
        with broker.link([UP], 100, "server") as second:
            assert ids(take(second, 2)) == [0, 1]
            for delivery in deliveries:
                first.acknowledge(delivery)
            for _ in range(2):
                with pytest.raises(BrokerError) as caught:
                    first.receive(60)
                assert caught.value.number == 208
    assert rows(folder) == 2


def test_a_stopped_consumer_loses_its_lease_and_its_late_acknowledgements_do_nothing(
    folder: Path, spawn: Spawn
) -> None:
    broker = EmbeddedBroker(folder, lease_seconds=LEASE_SECONDS)
    broker.declare([UP])
    store(broker, 5)
    process, connection = spawn(consume, folder, "server-a", 3, 0, LEASE_SECONDS)
    assert connection.recv() == list("012")
    stop_outside_a_transaction(process, folder)
    with broker.link([UP], 100, "server-b") as successor:
        deliveries = take(successor, 5)
        assert ids(deliveries) == [0, 1, 2, 3, 4]
        connection.send("go on")
        os.kill(process.pid or 0, signal.SIGCONT)
        assert connection.poll(20)
        assert connection.recv() == 208
        process.join()
        assert rows(folder) == 5
        for delivery in deliveries:
            successor.acknowledge(delivery)
        wait_until(lambda: rows(folder) == 0, 10, "the successor's acknowledgements to be written")


def stop_outside_a_transaction(process: SpawnProcess, folder: Path) -> None:
    """SQLite's lock cannot be taken from a stopped process, which holds it for a millisecond now and then."""
    while True:
        os.kill(process.pid or 0, signal.SIGSTOP)
        with closing(sqlite3.connect(folder / "broker.sqlite", timeout=0.2, isolation_level=None)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError:
                os.kill(process.pid or 0, signal.SIGCONT)


def test_a_lease_from_before_a_reboot_is_void(
    broker: EmbeddedBroker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The monotonic clock starts again, so the lease seems to reach far into the future."""
    store(broker, 1)
    with closing(sqlite3.connect(folder / "broker.sqlite")) as database, database:
        database.execute(
            "UPDATE queue SET owner = 'server-a', link = 'gone', expires = ?, taken = 1",
            (time.monotonic() + 1e6,),
        )
    assert broker.depth(UP) == 1
    with broker.link([UP], 8, "server-b") as link:
        assert ids(take(link, 1)) == [0]


def test_body_files_go_when_their_messages_are_acknowledged(broker: EmbeddedBroker, folder: Path) -> None:
    store(broker, 9)
    assert files(folder) == 3
    with broker.link([UP], 100, "server") as link:
        deliveries = take(link, 9)
        assert files(folder) == 3
        for delivery in deliveries[:5]:
            link.acknowledge(delivery)
        wait_until(lambda: rows(folder) == 4 and files(folder) == 2, 10, "files of acknowledged messages to go")
    broker.delete([UP])
    assert rows(folder) == files(folder) == 0
    assert broker.depth(UP) is None


def test_files_without_a_row_are_removed_unless_a_publisher_is_between_the_two(
    broker: EmbeddedBroker, folder: Path
) -> None:
    store(broker, 3)
    orphan = folder / "bodies" / "0123456789abcdef"
    orphan.write_bytes(b"half a body")
    with (folder / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        broker.declare([UP])
        assert orphan.exists()
    broker.declare([UP])
    assert not orphan.exists()
    with broker.link([UP], 100, "server") as link:
        assert [delivery.body for delivery in take(link, 3)] == [body(0), body(1), body(2)]


def test_two_processes_publish_to_two_queues_at_once(broker: EmbeddedBroker, folder: Path, spawn: Spawn) -> None:
    count = 150  # Nobody reads their connections, which hold about 270 small messages.
    for queue in (UP, OTHER):
        spawn(publish, folder, queue, count)
    received: dict[str, list[int]] = {UP.name: [], OTHER.name: []}
    with broker.link([UP, OTHER], 16, "server") as link:
        for _ in range(2 * count):
            (delivery,) = take(link, 1)
            number = int(delivery.message_id)
            assert delivery.body == body(number)
            received[delivery.queue].append(number)
            link.acknowledge(delivery)
    assert received == {UP.name: list(range(count)), OTHER.name: list(range(count))}
    assert rows(folder) == files(folder) == 0


def test_processes_may_create_the_folder_at_the_same_time(folder: Path, spawn: Spawn) -> None:
    workers = [spawn(declare, folder) for _ in range(6)]
    assert [connection.recv() for _, connection in workers] == ["declared"] * 6


def test_waiting_messages_do_not_count_those_handed_out(folder: Path) -> None:
    """So a server that cannot acknowledge before its next checkpoint gets what it needs to reach that."""
    small = Queue("night.west.up", "night.west", "up", 3000, DEAD)
    broker = EmbeddedBroker(folder)
    broker.declare([small])
    with broker.link([], 8, "site") as site, broker.link([small], 8, "server") as server:
        for number in range(5):
            site.publish(small, str(number), [bytes(1000)])
        assert ids(take(server, 5)) == [0, 1, 2, 3, 4]
        events = [site.receive(10) for _ in range(7)]
    assert [event.message_id for event in events if isinstance(event, Confirmed)] == list("01234")
    assert events.count(Unblocked()) == 1
    assert events.count(Blocked(f"queue {small.name} is full")) == 1


@pytest.mark.parametrize("obstacle", ["file", "garbage"])
def test_a_folder_that_cannot_be_used_is_201(obstacle: str, folder: Path) -> None:
    if obstacle == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / "broker.sqlite").write_bytes(b"not a database" * 1000)
    for use in (
        lambda: EmbeddedBroker(folder).declare([UP]),
        lambda: EmbeddedBroker(folder).link([], 8, "site"),
    ):
        with pytest.raises(BrokerError) as caught:
            use()
        assert caught.value.number == 201
        assert caught.value.__cause__ is None
