"""Workers of this machine with the public images of RabbitMQ and Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
from testcontainers.community.rabbitmq import RabbitMqContainer
from testcontainers.community.redis import RedisContainer

from tests.harness.workers import Hospital

pytestmark = pytest.mark.containers


@pytest.mark.timeout(300)
def test_a_run_over_containers_is_the_run_without(tmp_path: Path) -> None:
    undisturbed = Hospital(tmp_path / "calm").in_peace()
    with RabbitMqContainer("rabbitmq:3-management") as rabbitmq, RedisContainer("redis:7") as redis:
        broker = f"amqp://guest:guest@localhost:{rabbitmq.get_exposed_port(5672)}/%2F"
        store = f"redis://localhost:{redis.get_exposed_port(6379)}/0"
        assert Hospital(tmp_path / "run", broker=broker, store=store).in_peace() == undisturbed
