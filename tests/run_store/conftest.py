"""Every run store of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nightsplit.shared.run_store.base import RunStore
from nightsplit.shared.run_store.connect import open_store
from nightsplit.simulation.store import MemoryStore
from tests.harness.services import RedisServer

Open = Callable[[], RunStore]


@pytest.fixture(
    params=["memory", "sqlite", pytest.param("redis", marks=pytest.mark.redis)],
)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same run's store again and again, as each worker would."""
    stores: list[RunStore] = []
    shared_object = MemoryStore()
    if request.param == "redis":
        redis_server = request.getfixturevalue("redis_server")

    def once_more() -> RunStore:
        if request.param == "memory":
            return shared_object
        address = "sqlite:store.sqlite"
        if request.param == "redis":
            address = redis_server.url
        stores.append(open_store(address, "night-1", tmp_path))
        return stores[-1]

    yield once_more
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Open) -> RunStore:
    return opened()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that other processes can open too."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path}/store.sqlite"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url
