"""RabbitMQ's host loses power under a publisher: what was confirmed is there afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.numbered import Numbered
from tests.harness.forgetful import USUAL, ForgetfulDisk
from tests.harness.servers import folder_of
from tests.harness.services import RABBITMQ_SCRIPTS, RabbitNode, declared_as, wait_until

pytestmark = [
    pytest.mark.campaign, pytest.mark.rabbitmq, pytest.mark.timeout(600), pytest.mark.usefixtures("power_cuts"),
]  # fmt: skip

CUTS = 3
UNSYNCED = ["RabbitMQ 3.13", "RabbitMQ 4.0", "RabbitMQ 4.1", "RabbitMQ 4.2", "RabbitMQ 4.3"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ForgetfulDisk]:
    with closing(ForgetfulDisk(tmp_path / "disk", USUAL)) as disk:
        yield disk


def lost_in_power_cuts(disk: ForgetfulDisk, scripts: Path) -> int:
    """How many confirmed messages are gone after `CUTS` power cuts of a node; expects the others in order."""
    dice = random.Random(1)
    with RabbitNode(disk.folder / "node", scripts) as node:
        disk.sync()  # Erlang's cookie, which is written at the first start, and not synced
        numbered = Numbered(node.url, seed=1)
        numbered.start()
        for _ in range(CUTS):
            wanted = len(numbered.confirmed) + dice.randrange(100, 250)
            wait_until(lambda wanted=wanted: len(numbered.confirmed) >= wanted, 60, f"{wanted} confirms")
            node.kill()
            disk.cut()
            node.start()
        lost, disordered = numbered.examine()
        assert disordered == 0
        return lost


@pytest.mark.parametrize("server", ["installed", *UNSYNCED])
def test_a_single_node_keeps_what_it_has_confirmed(disk: ForgetfulDisk, server: str) -> None:
    assert lost_in_power_cuts(disk, RABBITMQ_SCRIPTS if server == "installed" else folder_of(server)) == 0


@pytest.mark.parametrize("server", UNSYNCED)
def test_classic_queues_would_not(disk: ForgetfulDisk, server: str) -> None:
    """The reason for the other type; where this fails, a new version syncs them again."""
    with declared_as("classic"):
        assert lost_in_power_cuts(disk, folder_of(server)) > 0
