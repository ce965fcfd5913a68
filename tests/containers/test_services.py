"""Workers of this machine with the public images of RabbitMQ and Redis."""

from __future__ import annotations

from pathlib import Path

import pytest
from testcontainers.community.rabbitmq import RabbitMqContainer
from testcontainers.community.redis import RedisContainer

from tests.harness.workers import Hospital

pytestmark = [pytest.mark.containers, pytest.mark.campaign]


@pytest.mark.timeout(300)
def test_a_run_over_containers_is_the_run_without(images: dict[str, str], tmp_path: Path) -> None:
    undisturbed = Hospital(tmp_path / "calm").in_peace()
    broker_image, store_image = images["NIGHTSPLIT_RABBITMQ_IMAGE"], images["NIGHTSPLIT_REDIS_IMAGE"]
    with RabbitMqContainer(broker_image) as rabbitmq, RedisContainer(store_image) as redis:
        broker = f"amqp://guest:guest@localhost:{rabbitmq.get_exposed_port(5672)}/%2F"
        store = f"redis://localhost:{redis.get_exposed_port(6379)}/0"
        assert Hospital(tmp_path / "run", broker=broker, store=store).in_peace() == undisturbed
