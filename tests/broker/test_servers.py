"""Every supported version of the servers: the tests that talk to one, once more against each that can be had."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.servers import environment, folder_of

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]

BROKER = [f"tests/broker/test_{story}.py" for story in ("contract", "contract_queues", "rabbitmq", "cluster")]
STORE = ["tests/run_store"]
RIGHTS = [
    "tests/broker/test_rights.py",
    "tests/console/test_keys.py::test_the_rights_of_a_site_suffice_for_its_commands",
]
DISKS = "tests/runs/test_server_disks.py"
NIGHTS = "tests/runs/test_campaign.py::test_"
OF_BROKER = [*BROKER, *RIGHTS, f"{NIGHTS}rabbitmq_in_strict_order_with_deaths_of_the_broker"]
OF_STORE = [*STORE, RIGHTS[0], f"{NIGHTS}rounds_over_rabbitmq"]
SUPPORTED = {
    **dict.fromkeys([f"RabbitMQ {version}" for version in ("3.13", "4.0", "4.1", "4.2")], OF_BROKER),
    "RabbitMQ 4.3": [*OF_BROKER, DISKS],
    **dict.fromkeys(["Valkey 8", "Valkey 9"], OF_STORE),
    "Redis 8": [*OF_STORE, DISKS],
}
"""Beside the installed ones, with the tests of brokers, stores, rights, disks and nights for each."""


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
