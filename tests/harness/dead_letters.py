"""Runs with dead letters, over every broker."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nightsplit.broker.embedded.broker import EmbeddedBroker
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.console.dead_letters import list_letters
from nightsplit.console.worker_file import WorkerFile
from nightsplit.server_worker.config import ServerSection
from nightsplit.shared.transport import Broker, Delivery, Queue
from nightsplit.simulation.broker import MemoryBroker
from nightsplit.site_worker.config import SiteSection
from tests.harness.night import Night, tiny_config
from tests.harness.services import wait_until

BROKERS = ["memory", "embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)]


def open_broker(request: pytest.FixtureRequest, folder: Path) -> Broker:
    if request.param == "memory":
        return MemoryBroker()
    if request.param == "embedded":
        return EmbeddedBroker(folder / "broker")
    return RabbitBroker(request.getfixturevalue("rabbitmq").vhost())


def sites_far_ahead(broker: Broker, folder: Path) -> Night:
    """A run whose sites send all they have without waiting: more than a prefetch."""
    return Night(tiny_config(("north", "south"), epochs=2, window=1000), folder, broker, prefetch=8)


def file_of(night: Night, site: str | None = None) -> WorkerFile:
    """As a worker's file names it; the broker is the night's own, and the hospital lets labels out."""

    class Here(WorkerFile):
        def __init__(self) -> None:
            place = {"broker": "embedded:broker", "store": "sqlite:run.db"}
            self.config = ServerSection(**place) if site is None else SiteSection(name=site, **place)
            self.base, self.run_config = night.folder, night.config
            self.sealer, self.state_folder = None, night.folder / "state"

        def open_broker(self) -> Broker:
            return night.broker

    (night.folder / "policy.toml").write_text(
        'allowed = ["activations", "labels", "counts"]\npackages = ["tests.harness.night"]\n'
    )
    return Here()


def listed(file: WorkerFile, capsys) -> list[dict]:
    capsys.readouterr()
    list_letters(file, as_json=True)
    return json.loads(capsys.readouterr().out)["dead_letters"]


def put(night: Night, queue: Queue, *messages: tuple[str, bytes, dict[str, str]]) -> None:
    """Publish (id, body, headers), and wait for the confirms."""
    with night.broker.link([], 8, "somebody") as link:
        for message in messages:
            link.publish(queue, message[0], [message[1]], message[2])
        while link.unconfirmed:
            link.receive(0.1)


def letters(night: Night, number: int, site: str = "north") -> list[tuple[str, bytes, dict[str, str]]]:
    """As an engine writes them; every third one so large that the embedded broker gives it a file."""
    origin = night.queues[site].up.name
    return [
        (
            f"dead/night/{site}/server/smashed/{n}/1",
            b"%d" % n + bytes(70_000 if n % 3 == 2 else 100),
            {
                "number": "306", "reason": "E306 Tensor has an unexpected shape: it is odd. Fix: mend it. (page)",
                "sender": site, "queue": origin, "time": "2026-03-01T22:00:00+00:00",
            },
        )
        for n in range(number)
    ]  # fmt: skip


def contents(night: Night, queue: Queue, number: int) -> list[Delivery]:
    """The first messages of a queue; they stay where they are."""
    found: list[Delivery] = []
    with night.broker.link([queue], number + 1, "reader") as link:
        deadline = time.monotonic() + 30
        while len(found) < number:
            assert time.monotonic() < deadline, f"{len(found)} of {number}"
            event = link.receive(0.2)
            if isinstance(event, Delivery):
                found.append(event)
        assert link.receive(0.2) is None
    return found


def depth(night: Night, queue: Queue, expected: int) -> None:
    wait_until(lambda: night.broker.depth(queue) == expected, 30, f"{expected} messages in {queue.name}")
