"""The embedded broker on a full disk: nothing is lost, and room can be made."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightsplit.broker.embedded import storage as embedded_folder
from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Link, Unblocked
from tests.harness.embedded import LARGE, UP, files, ids, store, take
from tests.harness.services import wait_until


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 MB that only this test fills."""
    if os.geteuid() != 0:
        pytest.skip("filling a disk needs a small file system, and mounting one needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"filling a disk needs a small file system, and mount says: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > leave_bytes:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast


@pytest.mark.campaign
@pytest.mark.parametrize("reserve", [embedded_folder.RESERVE_BYTES, 0], ids=["reserve", "to the last byte"])
@pytest.mark.parametrize("size", [1000, LARGE], ids=["rows", "files"])
def test_a_full_disk_loses_nothing_and_sending_goes_on_when_there_is_room(
    reserve: int, size: int, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_folder, "RESERVE_BYTES", reserve)
    broker = EmbeddedBroker(small_disk / "broker")
    broker.declare([UP])
    store(broker, 3)
    with broker.link([], 8, "site") as site, broker.link([UP], 100, "server") as server:
        ballast = fill(small_disk, reserve // 2)
        for number in range(3, 10):
            site.publish(UP, str(number), [random.Random(number).randbytes(size)])
        trouble = site.receive(10)
        assert isinstance(trouble, Blocked)
        assert trouble.reason.startswith("disk is full")
        assert site.receive(0.5) is None, "told once"
        assert site.unconfirmed == frozenset("3456789")
        deliveries = take(server, 3)
        ballast.unlink()
        assert [site.receive(10) for _ in range(8)] == [*(Confirmed(n) for n in "3456789"), Unblocked()]
        deliveries += take_past_trouble(server, 7)
        assert ids(deliveries) == list(range(10))
        assert deliveries[-1].body == random.Random(9).randbytes(size)
        for delivery in deliveries:
            server.acknowledge(delivery)
        wait_until(lambda: files(small_disk / "broker") == 0, 10, "acknowledgements to be written")


def take_past_trouble(link: Link, count: int) -> list[Delivery]:
    """As `take`; the consumer may have met the full disk too, when it renewed its lease."""
    taken: list[Delivery] = []
    while len(taken) < count:
        event = link.receive(20)
        assert event is not None
        if isinstance(event, Delivery):
            taken.append(event)
    return taken


def test_a_consumer_can_make_room_on_a_disk_that_messages_filled(small_disk: Path) -> None:
    broker = EmbeddedBroker(small_disk / "broker")
    broker.declare([UP])
    with broker.link([], 8, "site") as site:
        for number in range(90):
            site.publish(UP, str(number), [bytes(10**6)])
        confirmed = 0
        while isinstance(event := site.receive(10), Confirmed):
            confirmed += 1
        assert isinstance(event, Blocked)
        assert 0 < confirmed < 90
        with broker.link([UP], 8, "server") as server:
            for number in range(90):
                (delivery,) = take(server, 1)
                assert delivery.message_id == str(number)
                server.acknowledge(delivery)
