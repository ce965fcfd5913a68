"""One suite over every run store: what a server may rely on when it takes over a run."""

from __future__ import annotations

import multiprocessing
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import redis

from nightsplit.shared.errors import BrokerError, ConfigError
from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.run_store.redis import RedisStore
from nightsplit.shared.run_store.sqlite import SqliteStore
from nightsplit.shared.run_store.status import Phase, WorkerStatus
from nightsplit.shared.storage.checkpoint import Pointer
from tests.harness.services import RedisServer, free_port
from tests.run_store.conftest import Open


def test_only_one_owner_holds_the_lease(opened: Open) -> None:
    first, second = opened(), opened()
    fence = first.acquire_lease("server-a", 60)
    assert fence is not None
    assert second.acquire_lease("server-b", 60) is None
    assert first.renew_lease("server-a", fence, 60)


def test_the_same_owner_acquires_again_with_a_larger_fence(opened: Open) -> None:
    before = opened().acquire_lease("server-a", 60)
    after = opened().acquire_lease("server-a", 60)
    assert before is not None
    assert after is not None
    assert after > before
    assert not opened().renew_lease("server-a", before, 60), "the first incarnation is over"


def test_an_expired_lease_is_handed_over_and_cannot_be_renewed(opened: Open) -> None:
    first, second = opened(), opened()
    before = first.acquire_lease("server-a", 0.2)
    assert before is not None
    assert second.acquire_lease("server-b", 0.2) is None
    time.sleep(0.3)
    after = second.acquire_lease("server-b", 60)
    assert after is not None
    assert after > before
    assert not first.renew_lease("server-a", before, 60)
    first.release_lease("server-a", before)
    assert second.renew_lease("server-b", after, 60), "a late release by the loser changes nothing"


def test_an_expired_lease_that_nobody_took_can_be_renewed(store: RunStore) -> None:
    fence = store.acquire_lease("server-a", 0.05)
    assert fence is not None
    time.sleep(0.1)
    assert store.renew_lease("server-a", fence, 60)
    assert store.acquire_lease("server-b", 60) is None


def test_renewing_extends_the_lease(store: RunStore) -> None:
    fence = store.acquire_lease("server-a", 0.2)
    assert fence is not None
    assert store.renew_lease("server-a", fence, 60)
    time.sleep(0.3)
    assert store.acquire_lease("server-b", 60) is None


def test_a_released_lease_is_free_and_its_fence_is_not_used_again(opened: Open) -> None:
    first, second = opened(), opened()
    before = first.acquire_lease("server-a", 60)
    assert before is not None
    first.release_lease("server-a", before)
    assert not first.renew_lease("server-a", before, 60)
    after = second.acquire_lease("server-b", 60)
    assert after is not None
    assert after > before


def test_the_pointer_moves_only_for_the_highest_fence(opened: Open) -> None:
    first, second = opened(), opened()
    assert first.pointer() is None
    old = first.acquire_lease("server-a", 0.05)
    assert old is not None
    assert first.move_pointer(Pointer(old, 1, "aa"))
    time.sleep(0.1)
    assert first.move_pointer(Pointer(old, 2, "bb")), "a lapsed lease that nobody took still counts"
    new = second.acquire_lease("server-b", 60)
    assert new is not None
    assert not first.move_pointer(Pointer(old, 3, "cc"))
    assert second.pointer() == Pointer(old, 2, "bb")
    assert second.move_pointer(Pointer(new, 3, "dd"))
    assert first.pointer() == Pointer(new, 3, "dd")
    second.release_lease("server-b", new)
    assert not first.move_pointer(Pointer(old, 4, "ee")), "a released lease does not revive an old fence"


def test_the_journal_keeps_the_first_writer(opened: Open) -> None:
    first, second = opened(), opened()
    assert first.journal_entry(1) is None
    assert first.claim_position(1, "north") == "north"
    assert second.claim_position(1, "south") == "north"
    assert second.journal_entry(1) == "north"
    assert second.claim_position(2, "south") == "south"


def test_applied_or_left_out_is_decided_once(opened: Open) -> None:
    """One server found a message of the site, another one found the site absent: the first entry stands for both."""
    zombie, successor = opened(), opened()
    assert successor.claim_position(1, "-north") == "-north"
    assert zombie.claim_position(1, "north") == "-north"
    assert zombie.claim_position(2, "north") == "north"
    assert successor.claim_position(2, "-north") == "north"


def test_threads_that_race_for_the_journal_agree(opened: Open) -> None:
    answers: dict[str, list[str]] = {}

    def fill(sender: str) -> None:
        store = opened()
        answers[sender] = [store.claim_position(position, sender) for position in range(1, 101)]

    threads = [threading.Thread(target=fill, args=(sender,)) for sender in ("north", "south", "west")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [opened().journal_entry(position) for position in range(1, 101)]
    assert list(answers.values()) == [held] * 3


def fill_journal(address: str, sender: str, answers: multiprocessing.Queue[list[str]]) -> None:
    with closing(open_store(address, "night-1", Path())) as store:
        answers.put([store.claim_position(position, sender) for position in range(1, 101)])


def test_processes_that_race_for_the_journal_agree(address: str) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[list[str]] = context.Queue()
    workers = [context.Process(target=fill_journal, args=(address, sender, answers)) for sender in ("north", "south")]
    for worker in workers:
        worker.start()
    given = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        worker.close()
    answers.close()
    answers.join_thread()
    with closing(open_store(address, "night-1", Path())) as store:
        assert given == [[store.journal_entry(position) for position in range(1, 101)]] * 2


def acquire(address: str, owner: str, fences: multiprocessing.Queue[int | None]) -> None:
    with closing(open_store(address, "night-1", Path())) as store:
        fences.put(store.acquire_lease(owner, 60))


def test_of_processes_that_race_for_the_lease_one_wins(address: str) -> None:
    """Also: opening a store that does not exist yet from several processes at once."""
    context = multiprocessing.get_context("spawn")
    fences: multiprocessing.Queue[int | None] = context.Queue()
    workers = [context.Process(target=acquire, args=(address, f"server-{n}", fences)) for n in range(4)]
    for worker in workers:
        worker.start()
    given = [fences.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        worker.close()
    fences.close()
    fences.join_thread()
    assert [fence for fence in given if fence is not None] == [1]


def test_everything_survives_reopening(address: str) -> None:
    with closing(open_store(address, "night-1", Path())) as store:
        fence = store.acquire_lease("server-a", 60)
        assert fence is not None
        assert store.move_pointer(Pointer(fence, 7, "ab"))
        store.claim_position(1, "north")
        store.put_status("north", WorkerStatus(phase=Phase.WORKING, sent=3))
    with closing(open_store(address, "night-1", Path())) as store:
        assert store.pointer() == Pointer(fence, 7, "ab")
        assert store.journal_entry(1) == "north"
        assert store.statuses(["north"])["north"].report == WorkerStatus(phase=Phase.WORKING, sent=3)
        assert store.acquire_lease("server-b", 60) is None
        assert store.renew_lease("server-a", fence, 60)


@pytest.mark.redis
def test_redis_keeps_everything_over_a_kill_of_its_server(redis_server: RedisServer) -> None:
    with closing(RedisStore(redis_server.url, "night-1")) as store:
        fence = store.acquire_lease("server-a", 60)
        assert fence is not None
        assert store.move_pointer(Pointer(fence, 1, "ab"))
        assert store.claim_position(1, "north") == "north"
        redis_server.kill()
        redis_server.start()
        assert store.pointer() == Pointer(fence, 1, "ab"), "the same store reconnects"
        assert store.claim_position(1, "south") == "north"
        assert store.renew_lease("server-a", fence, 60)


def test_runs_in_one_place_do_not_see_each_other(address: str) -> None:
    with (
        closing(open_store(address, "night-1", Path())) as one,
        closing(open_store(address, "night-2", Path())) as other,
    ):
        one.claim_position(1, "north")
        assert one.acquire_lease("server-a", 60) == 1
        assert other.journal_entry(1) is None
        assert other.acquire_lease("server-b", 60) == 1


def test_a_lease_from_before_a_reboot_is_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monotonic clock starts again, so the lease seems to reach far into the future."""
    with closing(SqliteStore(tmp_path / "store.sqlite", "night-1")) as store:
        uptime = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: uptime + 1e6)
        before = store.acquire_lease("server-a", 10)
        assert before is not None
        monkeypatch.setattr(time, "monotonic", lambda: uptime)
        after = store.acquire_lease("server-b", 10)
        assert after is not None
        assert after > before


@pytest.mark.parametrize("place", ["file in the way", "no server", "wrong password"])
def test_a_store_out_of_reach_is_207(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    address = {
        "file in the way": "sqlite:file/store.sqlite",
        "no server": f"redis://127.0.0.1:{free_port()}/0",
        "wrong password": "redis://:secret@127.0.0.1:{port}/0",
    }[place]
    if place == "wrong password":
        with RedisServer(tmp_path / "redis") as server:
            with closing(redis.Redis.from_url(server.url)) as admin:
                admin.config_set("requirepass", "another")
            with pytest.raises(BrokerError) as caught:
                open_store(address.format(port=server.port), "night-1", tmp_path)
        assert "secret" not in str(caught.value)
    else:
        with pytest.raises(BrokerError) as caught:
            open_store(address, "night-1", tmp_path)
    assert caught.value.number == 207
    assert caught.value.__cause__ is None
    assert caught.value.remedy


@pytest.mark.redis
def test_a_redis_that_dies_is_207_until_it_is_back(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server, closing(RedisStore(server.url, "night-1")) as store:
        assert store.claim_position(1, "north") == "north"
        server.kill()
        with pytest.raises(BrokerError) as caught:
            store.claim_position(2, "north")
        assert caught.value.number == 207
        server.start()
        assert store.claim_position(2, "south") in ("north", "south")
        assert store.journal_entry(1) == "north"


@pytest.mark.parametrize("address", ["postgres://host/db", "sqlite:", "store.sqlite", "redis://localhost:port/0"])
def test_any_other_address_is_107(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(address, "night-1", tmp_path)
    assert caught.value.number == 107


def test_a_relative_file_belongs_to_the_base_folder(tmp_path: Path) -> None:
    open_store("sqlite:state/store.sqlite", "night-1", tmp_path).close()
    assert (tmp_path / "state" / "store.sqlite").is_file()
