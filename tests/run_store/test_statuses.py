"""One suite over every run store: statuses of workers, their age, and what anybody else writes in their place."""

from __future__ import annotations

import json
import time
from contextlib import closing
from datetime import UTC, datetime

import pytest

from nightsplit.console.ui.text import duration
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.redis import RedisStore
from nightsplit.shared.run_store.sqlite import SqliteStore
from nightsplit.shared.run_store.status import UNREADABLE, Phase, Presence, SiteStatus, WorkerStatus
from nightsplit.simulation.store import MemoryStore
from tests.harness.foreign_status import FOREIGN, write_row
from tests.harness.services import RedisServer
from tests.run_store.conftest import Open


def test_statuses_tell_their_age(opened: Open) -> None:
    first, second = opened(), opened()
    presence = Presence(silent_seconds=0.5, beat="a", last_seen=datetime(2026, 11, 21, 22, tzinfo=UTC))
    status = WorkerStatus(
        phase=Phase.WAITING, detail='its "shift"', sent=412, refused=0, lacking=("east",),
        sites={"south": SiteStatus(loss=0.5, share=0.25, presence=presence)},
    )  # fmt: skip
    first.put_status("north", WorkerStatus(phase=Phase.STARTING))
    first.put_status("north", status)
    time.sleep(0.2)
    second.put_status("server", WorkerStatus(phase=Phase.WORKING))
    statuses = second.statuses(["server", "north", "south"])
    assert set(statuses) == {"north", "server"}
    assert set(first.statuses(["north"])) == {"north"}
    assert statuses["north"].worker == "north"
    assert statuses["north"].report == status
    assert 0.15 < statuses["north"].age_seconds < 10
    assert 0 <= statuses["server"].age_seconds < statuses["north"].age_seconds


def write_raw(store: RunStore, worker: str, record: bytes, written: object = None) -> None:
    """What somebody who knows nothing of our code writes in the name of a worker."""
    if isinstance(store, MemoryStore):
        store._statuses[worker] = (record.decode(errors="surrogateescape"), time.monotonic())
    elif isinstance(store, SqliteStore):
        write_row(store._path, "night-1", worker, record, written)
    elif isinstance(store, RedisStore):
        entry = [time.time() * 1000 if written is None else written, record.decode(errors="surrogateescape")]
        put_entry(store, worker, json.dumps(entry, ensure_ascii=False).encode(errors="surrogateescape"))


def put_entry(store: RedisStore, worker: str, entry: bytes | str) -> None:
    store._redis.delete(store._status(worker))
    store._redis.rpush(store._status(worker), entry)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_status_is_unreadable_and_harms_no_other(opened: Open, kind: str) -> None:
    store = opened()
    store.put_status("north", WorkerStatus(phase=Phase.WORKING, sent=3))
    store.put_status("server", WorkerStatus(phase=Phase.WORKING))
    write_raw(store, "north", FOREIGN[kind])
    statuses = opened().statuses(["server", "north", "south"])
    assert statuses["north"].report is UNREADABLE
    assert 0 <= statuses["north"].age_seconds <= time.time()
    assert statuses["server"].report == WorkerStatus(phase=Phase.WORKING)
    store.put_status("north", WorkerStatus(phase=Phase.WORKING, sent=4))
    assert store.statuses(["north"])["north"].report.sent == 4, "the next word is heard"


@pytest.mark.parametrize("written", [1e300, -1e300, 9e999, -9e999, "yesterday", b"\xff"], ids=str)
def test_a_falsified_time_is_no_error(opened: Open, written: object) -> None:
    store = opened()
    store.put_status("north", WorkerStatus(phase=Phase.WORKING))
    if isinstance(store, RedisStore):
        put_entry(store, "north", f'[{written}, "{{}}"]')
    else:
        write_raw(store, "north", b'{"phase":"working"}', written)
    age = store.statuses(["north"])["north"].age_seconds
    assert 0 <= age <= time.time() + 1
    assert duration(age)


@pytest.mark.redis
def test_an_entry_of_redis_that_is_none_of_ours_is_unreadable(redis_server: RedisServer) -> None:
    with closing(RedisStore(redis_server.url, "night-1")) as store:
        for entry in (b"x", b"\xff" * 2**23, b"[" * 8000, b"[1]", b'[1,{"phase":"working"}]', b"[null,null]", b"{}"):
            put_entry(store, "north", entry)
            assert_unreadable(store, entry[:20])
            store._redis.set(store._status("north"), entry)  # as an earlier version did
            assert_unreadable(store, entry[:20])
        store.admit(["north"])
        assert store.statuses(["north"]) == {}
        store.put_status("north", WorkerStatus(phase=Phase.WORKING))
        store.admit(["north"])
        assert store.statuses(["north"])["north"].online, "a status that is there remains"


def assert_unreadable(store: RedisStore, about: object) -> None:
    north = store.statuses(["north"])["north"]
    assert north.report is UNREADABLE, about
    assert not north.online
