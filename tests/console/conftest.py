"""A run with dead letters, over every broker."""

import pytest

from nightsplit.shared.transport import Broker
from tests.harness.dead_letters import BROKERS, open_broker, sites_far_ahead
from tests.harness.night import Night


@pytest.fixture(params=BROKERS)
def broker(request, tmp_path) -> Broker:
    return open_broker(request, tmp_path)


@pytest.fixture
def night(broker, tmp_path) -> Night:
    return sites_far_ahead(broker, tmp_path)
