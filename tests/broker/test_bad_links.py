"""A hospital's line: slow, silent, cut off, broken in mid-message. The run ends as if nothing had been.

Of long outages the waiting is left out, and nothing else: a link that has noticed an outage, after two
heartbeats, tries again every 10 s at most, so 2.5 hours are more of what 20 s show. Heartbeats are
shortened from 10 s to 2, and the clock of shifts is moved by hand.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from zoneinfo import ZoneInfo

import pytest
from rich.console import Console

from nightsplit.broker.rabbitmq import broker as rabbitmq
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.rabbitmq.outbox import backoff
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.console.ui.progress import Progress
from nightsplit.console.ui.text import state_of
from nightsplit.shared.clock import Clock
from nightsplit.shared.run_store.status import WorkerStatus
from nightsplit.shared.runtime.process import StopSignal
from nightsplit.shared.transport import Confirmed, Delivery, Link, Queue
from nightsplit.shared.transport import Event as LinkEvent
from nightsplit.simulation.clock import ManualClock
from nightsplit.site_worker.worker import SiteWorker
from tests.harness.links import Direction, Line
from tests.harness.services import RabbitNode, RedisServer, wait_until
from tests.harness.study import change
from tests.harness.workers import Hospital

pytestmark = [pytest.mark.rabbitmq, pytest.mark.timeout(300)]

EPOCHS = 8
BACK_S = 30.0
"""Within half a minute of the line being back, a site is."""
BERLIN = ZoneInfo("Europe/Berlin")
DOWN = "blocked: the connection to the broker is lost"


def small_run(folder: Path, broker: str = "embedded:broker", store: str = "sqlite:run.db") -> Hospital:
    """North, whose line is bad in these tests, and south, whose line is good."""
    return Hospital(folder, broker, store, epochs=EPOCHS, sites=("north", "south"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of every part of the model, trained over lines without a fault."""
    return small_run(tmp_path_factory.mktemp("calm") / "run").in_peace()


@pytest.fixture
def hospital(tmp_path: Path, rabbitmq: RabbitNode, redis_server: RedisServer) -> Iterator[Hospital]:
    hospital = small_run(tmp_path / "run", rabbitmq.vhost(), redis_server.url)
    yield hospital
    hospital.close()


@contextmanager
def line_of(
    hospital: Hospital, port: int, site: str = "north", delay: float = 0.0, bits_per_s: float | None = None
) -> Iterator[Line]:
    """Let a site reach the service at `port` through a line of its own."""
    with Line(port, delay, bits_per_s) as line:
        change(hospital.folder / f"{site}.toml", f":{port}/", f":{line.port}/")
        yield line


class North:
    """The site's worker in this process, where its clock can be moved and its heartbeat shortened."""

    def __init__(self, hospital: Hospital, clock: Clock | None = None) -> None:
        self.said = io.StringIO()
        self.state = ""
        self._progress = Progress("north", Console(file=self.said, width=200))
        self._stop = StopSignal()
        self._worker = SiteWorker(hospital.folder / "north.toml", clock=clock, stop=self._stop, observe=self._observe)
        self._thread = ThreadPoolExecutor(1)
        self._work = self._thread.submit(self._worker.work)

    def _observe(self, status: WorkerStatus) -> None:
        self.state = state_of(status)
        self._progress.observe(status)

    def wait_until(self, state: str, seconds: float) -> None:
        """Wait until it says that it is in a state that begins so."""
        wait_until(lambda: self.state.startswith(state) or self._work.done(), seconds, f"{state}, not {self.state}")
        assert not self._work.done()

    def finish(self) -> str:
        """Wait for its end; what it has said."""
        assert self._work.result(60) is True
        return self.said.getvalue()

    def close(self) -> None:
        """Have it leave, if it has not."""
        self._stop.requested = True
        self._thread.shutdown()


@contextmanager
def north_of(hospital: Hospital, clock: Clock | None = None) -> Iterator[North]:
    """Everybody at work."""
    for worker in ("server", "south"):
        hospital.start(worker)
    north = North(hospital, clock)
    try:
        yield north
    finally:
        north.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats of 2 s in this process, so that a silence is noticed after 14 s at most, in place of 30."""
    monkeypatch.setattr(rabbitmq, "RabbitBroker", partial(RabbitBroker, heartbeat=2))


# Whole runs


@pytest.mark.campaign
def test_a_night_over_4_megabit_with_200_milliseconds(
    hospital: Hospital, undisturbed: dict[str, str], rabbitmq: RabbitNode, redis_server: RedisServer
) -> None:
    slow = partial(line_of, hospital, delay=0.1, bits_per_s=4e6)
    with slow(rabbitmq.port) as line, slow(redis_server.port):
        assert hospital.in_peace() == undisturbed
        assert min(line.passed("up"), line.passed("down")) > 50_000


@pytest.mark.campaign
@pytest.mark.usefixtures("impatient")
def test_a_line_that_falls_silent_while_both_ends_believe_in_it(
    hospital: Hospital, undisturbed: dict[str, str], rabbitmq: RabbitNode, redis_server: RedisServer
) -> None:
    """As with an outage of 6 minutes: nobody is told, and afterwards nobody remembers the connections."""
    with (
        line_of(hospital, rabbitmq.port) as line,
        line_of(hospital, redis_server.port) as line_to_store,
        north_of(hospital) as north,
    ):
        hospital.wait_for_steps(30)
        line.fall_silent()
        line_to_store.fall_silent()
        north.wait_until(DOWN, 60)
        steps = hospital.steps
        assert "nothing is lost" in north.state

        line.heal()
        line_to_store.heal()
        hospital.wait_for_steps(steps + 2, BACK_S)
        said = north.finish()
        hospital.wait_for_end()
    assert f"north: {DOWN}" in said
    assert hospital.models() == undisturbed


@pytest.mark.campaign
def test_an_outage_of_two_and_a_half_hours_over_the_end_of_a_shift(
    hospital: Hospital, undisturbed: dict[str, str], rabbitmq: RabbitNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails at half past four; the shift ends at six. The next evening it is down, then comes and goes."""
    site = hospital.folder / "north.toml"
    site.write_text(site.read_text().replace("[data]", 'shift = "22:00-06:00 Europe/Berlin"\n[data]'))
    clock = ManualClock(datetime(2026, 3, 3, 4, 30, tzinfo=BERLIN))
    monkeypatch.setattr("nightsplit.broker.rabbitmq.broker.FIRST_CONNECTION_S", 1.0)
    breaks = Event()
    look = RabbitBroker.depth

    def look_and_break(broker: RabbitBroker, queue: Queue) -> int | None:
        waiting = look(broker, queue)
        if breaks.is_set():
            line.refuse()
            breaks.clear()
        return waiting

    monkeypatch.setattr(RabbitBroker, "depth", look_and_break)
    with line_of(hospital, rabbitmq.port) as line, north_of(hospital, clock) as north:
        hospital.wait_for_steps(30)
        line.refuse()
        north.wait_until(DOWN, 20)
        clock.advance(2.5 * 3600)
        north.wait_until("blocked: waiting for the broker", 20)  # sleeping until the evening is moving the clock
        assert clock.now().astimezone(BERLIN) >= datetime(2026, 3, 3, 22, tzinfo=BERLIN)
        breaks.set()
        line.heal()
        wait_until(lambda: not breaks.is_set(), 20, "the site to see its queue")
        time.sleep(3)
        north.wait_until("blocked: waiting for the broker", 20)
        steps = hospital.steps
        line.heal()
        hospital.wait_for_steps(steps + 2, BACK_S)
        said = north.finish()
        hospital.wait_for_end()
    assert [word for word in ("is lost", "its shift", "for the broker") if word not in said] == []
    assert hospital.models() == undisturbed


@pytest.mark.campaign
def test_resets_in_mid_message_throughout_a_run(
    hospital: Hospital, undisturbed: dict[str, str], rabbitmq: RabbitNode
) -> None:
    dice = random.Random(4)
    with line_of(hospital, rabbitmq.port) as line:
        for worker in hospital.workers:
            hospital.start(worker)
        hospital.wait_for_steps(5)
        deadline = time.monotonic() + 60
        while line.resets < 30:
            assert time.monotonic() < deadline, f"{line.resets} resets: {hospital.logs()}"
            if not line.is_about_to_break:
                direction: Direction = dice.choice(["up", "down"])
                line.reset_after(dice.randrange(1, 12_000), direction)
            time.sleep(0.01)
        hospital.wait_for_end()
    assert hospital.models() == undisturbed
    assert DOWN in (hospital.folder / "north.log").read_text()


# What passes over one line


@pytest.fixture
def queues(rabbitmq: RabbitNode) -> tuple[str, SiteQueues]:
    """Address of a broker with the queues of one site, and these."""
    url, queues = rabbitmq.vhost(), site_queues("run", "site", 2**30)
    RabbitBroker(url).declare(queues)
    return url, queues


def over(line: Line, url: str, port: int, heartbeat: int = rabbitmq.HEARTBEAT_S) -> RabbitBroker:
    return RabbitBroker(url.replace(f":{port}/", f":{line.port}/"), heartbeat=heartbeat)


def events_of(link: Link, patience: float) -> Iterator[LinkEvent]:
    """What the link tells; there must be something every `patience` seconds."""
    while True:
        event = link.receive(patience)
        assert event is not None, f"nothing for {patience} s; unconfirmed: {link.unconfirmed}"
        yield event


@pytest.mark.campaign
def test_messages_that_take_longer_than_a_heartbeat(rabbitmq: RabbitNode, queues: tuple[str, SiteQueues]) -> None:
    """Our heartbeats wait behind a message of 4 s, up, and the broker's behind one down; both are alive."""
    url, (up, _, _) = queues
    body = random.Random(1).randbytes(2 * 10**6)
    with Line(rabbitmq.port, delay=0.1, bits_per_s=4e6) as line:
        broker = over(line, url, rabbitmq.port, heartbeat=1)
        with broker.link([up], 16, "both") as link:
            for number in range(3):
                link.publish(up, f"m{number}", [body])
            events = list(islice(events_of(link, 20), 6))
    assert [type(event) for event in events if not isinstance(event, Delivery)] == [Confirmed] * 3
    assert [(event.message_id, event.body == body) for event in events if isinstance(event, Delivery)] == [
        ("m0", True), ("m1", True), ("m2", True),
    ]  # fmt: skip


def test_a_message_cut_in_the_middle_is_sent_again_whole(rabbitmq: RabbitNode, queues: tuple[str, SiteQueues]) -> None:
    """Forty resets within publishes, forty within deliveries: every message arrives, whole and in its order."""
    url, (up, _, _) = queues
    dice = random.Random(2)
    bodies = {f"m{number:03}": dice.randbytes(dice.randrange(60_000)) for number in range(100)}
    with Line(rabbitmq.port) as line:
        broker = over(line, url, rabbitmq.port)
        with broker.link([], 1, "site") as link:
            for name, body in bodies.items():
                link.publish(up, name, [body])
            line.reset_after(1000, "up")
            for _ in events_of(link, 20):
                if line.resets < 40 and not line.is_about_to_break:
                    line.reset_after(dice.randrange(60_000), "up")
                if not link.unconfirmed:
                    break
        assert line.resets == 40

    arrived: dict[str, bytes] = {}
    # Slow, and with room for all messages: there is always something under way that the next reset can meet.
    with Line(rabbitmq.port, bits_per_s=8e6) as line:
        broker = over(line, url, rabbitmq.port)
        with broker.link([up], len(bodies), "server") as link:
            line.reset_after(1000, "down")
            for event in events_of(link, 20):
                if line.resets < 40 and not line.is_about_to_break:
                    line.reset_after(dice.randrange(60_000), "down")
                if isinstance(event, Delivery):
                    assert event.body == bodies[event.message_id]
                    arrived.setdefault(event.message_id, event.body)
                    if line.resets == 40:
                        link.acknowledge(event)
                if len(arrived) == len(bodies):
                    break
        assert line.resets == 40
    assert list(arrived) == list(bodies)


def test_pauses_between_attempts_stay_short_through_a_long_outage() -> None:
    """A thousand attempts are about two hours."""
    pauses = list(islice(backoff(), 1000))
    assert pauses[0] <= 0.1
    assert 5.0 <= pauses[-1] <= max(pauses) <= 10.0
    assert sum(pauses) > 1.5 * 3600
