"""Services that several tests share. A missing package fails the test; it is never skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from tests.harness.forgetful import ForgetfulDisk
from tests.harness.services import RabbitNode, RedisServer

torch.set_num_threads(1)
"""Two files run side by side, and networks are tiny here: a second thread would wait for the first."""


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitNode]:
    """One node for the whole session; `rabbitmq.vhost()` gives a test its own part of it."""
    with RabbitNode(tmp_path_factory.mktemp("rabbitmq")) as node:
        yield node


@pytest.fixture(scope="session")
def redis_of_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis server for the whole session."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(redis_of_session: RedisServer) -> RedisServer:
    """The session's Redis, empty: runs of several tests have the same name."""
    redis_of_session.clear()
    return redis_of_session


@pytest.fixture(scope="session")
def power_cuts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where no disk can be made whose power can be cut."""
    try:
        with closing(ForgetfulDisk(tmp_path_factory.mktemp("power") / "disk")) as disk:
            disk.cut()
    except (OSError, RuntimeError) as error:
        pytest.skip(f"a power cut needs root, loop devices and mkfs.ext4: {error}")
