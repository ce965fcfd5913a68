"""Every supported version of the servers: the tests that talk to one, once more against each that can be had."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.servers import environment, folder_of

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]

BROKER = ["tests/broker/test_contract.py", "tests/broker/test_rabbitmq.py", "tests/broker/test_cluster.py"]
STORE = ["tests/run_store/test_contract.py"]
BOTH = ["tests/broker/test_rights.py", "tests/console/test_keys.py", "tests/runs/test_campaign.py"]
SUPPORTED = {
    "RabbitMQ 3.13": BROKER + BOTH,
    "RabbitMQ 4.0": BROKER + BOTH,
    "RabbitMQ 4.1": BROKER + BOTH,
    "RabbitMQ 4.2": BROKER + BOTH,
    "RabbitMQ 4.3": BROKER + BOTH,
    "Redis 8": STORE + BOTH,
    "Valkey 8": STORE + BOTH,
    "Valkey 9": STORE + BOTH,
}
"""Beside the installed ones, with the files whose tests of brokers, stores, rights and nights are run."""


@pytest.mark.parametrize("server", SUPPORTED)
def test_a_supported_server_passes(server: str) -> None:
    folder, product = folder_of(server), server.split()[0]
    chosen = "rabbitmq" if product == "RabbitMQ" else "redis"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, *SUPPORTED[server]]
    done = subprocess.run(
        command, env={**os.environ, **environment(product, folder)}, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
