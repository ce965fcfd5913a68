"""A RabbitMQ node of the test's own is killed -9 again and again, under a publisher and under a training run."""

import pytest

from tests.faults.chaos import Campaign, carry_out, passed
from tests.harness.processes import Process


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_confirmed_messages_and_the_training_survive_the_broker(tmp_path):
    result = carry_out(Campaign(kills=0, broker_kills=3, broker="rabbitmq", seed=7, begin=Process), tmp_path)
    assert result["broker_kills"] == 3
    assert result["confirmed"] > 100, result
    assert result["confirmed_lost"] == 0, result
    assert result["confirmed_disordered"] == 0, result
    assert passed(result), result
