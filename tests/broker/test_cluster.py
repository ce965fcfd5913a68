"""Three RabbitMQ nodes with quorum queues: the leader is killed, freezes, is cut off, and training goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from nightsplit.broker.rabbitmq import connection as rabbitmq_connection
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.rabbitmq.errors import arguments
from nightsplit.broker.topology import SiteQueues, site_queues
from nightsplit.shared.config.run import WireSection
from nightsplit.shared.errors import BrokerError
from nightsplit.shared.transport import Blocked, Confirmed, Delivery, Link, Unblocked
from tests.faults.numbered import Numbered
from tests.harness.cluster import ClusterNode, cluster
from tests.harness.links import Line
from tests.harness.services import RabbitNode, RedisServer, free_port, wait_until
from tests.harness.workers import Hospital

pytestmark = [pytest.mark.rabbitmq, pytest.mark.timeout(600)]

EPOCHS = 40  # the run may not be over before the last strike, on a fast machine neither
PATIENCE = 200  # seconds: what a channel owes is waited for as long as a minute


def small_run(folder: Path, broker: str = "embedded:broker", store: str = "sqlite:run.db") -> Hospital:
    return Hospital(folder, broker, store, epochs=EPOCHS, sites=("north", "south"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return small_run(tmp_path_factory.mktemp("calm") / "run").in_peace()


@pytest.mark.campaign
def test_the_leader_freezes_dies_and_is_cut_off_while_training(
    tmp_path: Path, undisturbed: dict[str, str], redis_server: RedisServer
) -> None:
    """Strict order: the run's weights are those of an undisturbed one; and no confirmed message is lost."""
    with cluster(tmp_path / "cluster") as nodes:
        # The node that declares a queue leads it. The workers talk to another one.
        declaring, numbered_queues = RabbitBroker(nodes.url(0)), ("one", "two", "three")
        for site in ("north", "south"):
            declaring.declare(site_queues("lipids", site, WireSection().queue_bytes))
        for name in numbered_queues:
            declaring.declare(site_queues("numbered", name, 2**30))
        hospital = small_run(tmp_path / "run", nodes.url(1), redis_server.url)
        numbered = Numbered(nodes.url(1), seed=1)

        def sleep() -> None:
            """In strict order nobody runs ahead of a site that sleeps: so the run waits while a node returns."""
            hospital.processes["south"].send_signal(signal.SIGSTOP)

        def work(strike: Callable[[], None] | None = None) -> None:
            """Strike while everybody is at work, and see the run go on."""
            hospital.processes["south"].send_signal(signal.SIGCONT)
            hospital.wait_for_steps(hospital.steps + 5, PATIENCE)
            if strike:
                strike()
            hospital.wait_for_steps(hospital.steps + 20, PATIENCE)
            sleep()

        def leader() -> ClusterNode:
            nodes.wait_until_whole()
            return nodes.leader("nightsplit.lipids.north.up")

        try:
            numbered.start()
            for worker in hospital.workers:
                hospital.start(worker)
            hospital.wait_for_steps(1)
            sleep()

            frozen = leader()
            work(frozen.freeze)
            frozen.thaw()
            frozen.restart()  # it may have lost sight of the others for good

            killed = leader()
            work(killed.kill)
            killed.start()

            lonely = leader()
            lonely.make_ready_to_cut_off(nodes.peers(lonely))
            work(lonely.cut_off)
            if lonely.pauses_in_a_minority:
                wait_until(lambda: not lonely.answers(), 60, "the lonely node to pause")
            work()
            lonely.join_again(nodes.peers(lonely))

            hospital.processes["south"].send_signal(signal.SIGCONT)
            hospital.wait_for_end()
            nodes.wait_until_whole()
            assert numbered.examine() == (0, 0)
            print(f"{len(numbered.confirmed)} confirmed, {numbered.copies} copies")
        finally:
            numbered.abandon()
            hospital.close()
    assert hospital.models() == undisturbed


@pytest.mark.campaign
def test_a_publisher_and_a_consumer_at_a_leader_that_is_cut_off(tmp_path: Path) -> None:
    """Heartbeats go on where the node does not pause: both leave it within half a minute."""
    with cluster(tmp_path) as nodes:
        broker, queues = RabbitBroker(nodes.url(0)), site_queues("run", "site", 2**30)
        broker.declare(queues)
        lonely = nodes.leader(queues.up.name)
        assert lonely is nodes.nodes[0]
        lonely.make_ready_to_cut_off(nodes.peers(lonely))
        with broker.link([queues.down], 4, "site") as site, RabbitBroker(nodes.url(1)).link([], 1, "server") as server:
            lonely.cut_off()
            wait_until(lambda: lonely.ctl("eval", "nodes().").strip() == "[]", 60, "the node to be cut off")
            cut_at = time.monotonic()
            site.publish(queues.up, "batch", [b"x"])
            server.publish(queues.down, "gradient", [b"y"])
            seen = {type(next_of(site, Confirmed, Delivery, patience=30)): time.monotonic() - cut_at for _ in range(2)}
            print({kind.__name__: f"{seconds:.1f} s" for kind, seconds in seen.items()})
            assert set(seen) == {Confirmed, Delivery}
            assert max(seen.values()) < 30
        lonely.join_again(nodes.peers(lonely))


# Several hosts, one node


@pytest.fixture
def url(rabbitmq: RabbitNode) -> str:
    """A cluster's address whose first host is away and whose others are one node under two names."""
    return rabbitmq.vhost().replace(
        f"127.0.0.1:{rabbitmq.port}", f"127.0.0.1:{free_port()},127.0.0.1:{rabbitmq.port},localhost:{rabbitmq.port}"
    )


@pytest.fixture
def queues(url: str) -> Iterator[SiteQueues]:
    queues = site_queues("run", "site", 2**30)
    yield queues
    RabbitBroker(url).delete(queues)


@pytest.fixture
def broker(url: str, queues: SiteQueues) -> RabbitBroker:
    """It has the queues."""
    broker = RabbitBroker(url)
    broker.declare(queues)
    return broker


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a channel owes is waited for two seconds, in place of a minute."""
    monkeypatch.setattr(rabbitmq_connection, "SILENCE_S_MAX", 2.0)


def next_of(link: Link, *kinds: type, patience: float = 20) -> object:
    """The next event of certain kinds, whatever comes before it."""
    while True:
        event = link.receive(patience)
        assert event is not None
        if isinstance(event, kinds):
            return event


def test_hosts_are_tried_in_turn(broker: RabbitBroker, queues: SiteQueues) -> None:
    with broker.link([queues.up], 1, "both") as link:
        link.publish(queues.up, "m", [b"x"])
        assert next_of(link, Confirmed, Delivery)
        assert next_of(link, Confirmed, Delivery)
    assert broker.depth(queues.up) == 1


@pytest.mark.campaign
def test_a_queue_that_a_cluster_does_not_know_for_a_while(broker: RabbitBroker, queues: SiteQueues) -> None:
    """Unroutable messages are offered again until there is a way, and a consumer comes back, too."""
    with broker.link([queues.down], 1, "site") as link:
        broker.delete([queues.up, queues.down])
        link.publish(queues.up, "m", [b"x"])
        trouble = next_of(link, Blocked)
        assert isinstance(trouble, Blocked)
        assert "trying again, nothing is lost" in trouble.reason
        broker.declare(queues)
        assert next_of(link, Confirmed) == Confirmed("m")
        link.publish(queues.down, "answer", [b"y"])
        arrived = next_of(link, Delivery)
        assert isinstance(arrived, Delivery)
        assert arrived.message_id == "answer"
    assert broker.depth(queues.up) == 1


@pytest.mark.campaign
def test_a_queue_that_a_cluster_does_not_know_for_long(
    broker: RabbitBroker, queues: SiteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_connection, "QUEUE_MISSING_S_MAX", 2.0)
    with broker.link([], 1, "site") as link:
        broker.delete([queues.up])
        link.publish(queues.up, "m", [b"x"])
        with pytest.raises(BrokerError, match=r"E205 .* m reaches no queue"):
            next_of(link, Confirmed)


@pytest.mark.campaign
@pytest.mark.usefixtures("impatient")
def test_a_channel_that_a_cluster_has_forgotten(broker: RabbitBroker, queues: SiteQueues, rabbitmq: RabbitNode) -> None:
    """Its process at the broker stands still, and the heartbeats go on: both connections begin anew."""
    with broker.link([queues.up], 1, "server") as link:
        link.publish(queues.up, "1", [b"x"])
        assert next_of(link, Confirmed, Delivery)
        assert next_of(link, Confirmed, Delivery)
        # Not the other ones, on which the link asks now and then.
        first = "(catch rabbit_channel:info(Channel, [number])) =:= [{number, 1}]"
        rabbitmq.ctl("eval", f"[sys:suspend(Channel) || Channel <- rabbit_channel:list(), {first}].")
        link.publish(queues.up, "2", [b"y"])
        trouble = next_of(link, Blocked)
        assert isinstance(trouble, Blocked)
        assert "the broker owes a reply and is silent for 4 s" in trouble.reason
        for number in ("1", "2"):
            delivery = next_of(link, Delivery)
            assert isinstance(delivery, Delivery)
            assert delivery.message_id == number
            link.acknowledge(delivery)


@pytest.mark.campaign
@pytest.mark.usefixtures("impatient")
def test_a_consumer_that_a_cluster_has_forgotten(
    broker: RabbitBroker, queues: SiteQueues, rabbitmq: RabbitNode
) -> None:
    """The queue takes its consumer for one whose node is away, though there was never a `nodeup` to come."""
    with broker.link([queues.up], 1, "server") as link:
        vhost = broker._addresses[0].virtual_host
        leader = f"{{'{vhost}_{queues.up.name}', node()}}"
        away = f"ra:process_command({leader}, {{down, Channel, noconnection}})"
        rabbitmq.ctl("eval", f"[{away} || Channel <- rabbit_channel:list()].")
        with broker.link([], 1, "site") as site:
            site.publish(queues.up, "m", [b"x"])
            assert next_of(site, Confirmed)
        delivery = next_of(link, Delivery)
        assert isinstance(delivery, Delivery)
        assert delivery.message_id == "m"


@pytest.mark.campaign
def test_a_quiet_cluster_is_left_alone(
    broker: RabbitBroker, queues: SiteQueues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to say, or a full prefetch, is no silence: no message is delivered twice."""
    monkeypatch.setattr(rabbitmq_connection, "SILENCE_S_MAX", 0.5)
    with broker.link([queues.up], 1, "server") as link:
        while link.receive(2.0) is not None:
            pass  # the first host is away
        for number in ("1", "2"):
            link.publish(queues.up, number, [b"x"])
        seen = [link.receive(3.0) for _ in range(4)]
        assert sorted(type(event).__name__ for event in seen if event) == ["Confirmed", "Confirmed", "Delivery"]
        assert seen[-1] is None


@pytest.mark.campaign
@pytest.mark.parametrize("trouble", ["alarm", "freeze"])
def test_a_broker_that_does_not_read_owes_nothing(
    broker: RabbitBroker, queues: SiteQueues, rabbitmq: RabbitNode, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """With an alarm, or frozen for a while: the publisher keeps its connection, and sends its message once."""
    monkeypatch.setattr(rabbitmq_connection, "SILENCE_S_MAX", 0.5)
    assert rabbitmq._process is not None
    with broker.link([], 1, "site") as link:
        while link.receive(1.0) is not None:
            pass  # the first host is away
        if trouble == "alarm":
            rabbitmq.ctl("set_vm_memory_high_watermark", "0.0001")
        else:
            os.killpg(rabbitmq._process.pid, signal.SIGSTOP)
        try:
            link.publish(queues.up, "m", [b"x"])
            time.sleep(3.0)
        finally:
            if trouble == "alarm":
                rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
            else:
                os.killpg(rabbitmq._process.pid, signal.SIGCONT)
        events = [event for event in iter(partial(link.receive, 3.0), None) if not isinstance(event, Unblocked)]
        assert [event for event in events if isinstance(event, Confirmed)] == [Confirmed("m")]
        assert all("alarm" in event.reason for event in events if isinstance(event, Blocked)), events
    assert broker.depth(queues.up) == 1


@pytest.mark.campaign
def test_a_message_on_a_slow_line_is_no_silence(
    broker: RabbitBroker, queues: SiteQueues, rabbitmq: RabbitNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that takes eight times as long as a silence may last, each way: it is sent once, and arrives once."""
    monkeypatch.setattr(rabbitmq_connection, "SILENCE_S_MAX", 0.5)
    with Line(rabbitmq.port, delay=0.1, bits_per_s=2e6) as line:
        vhost = broker._addresses[0].virtual_host
        slow = RabbitBroker(f"amqp://guest:guest@127.0.0.1:{line.port},localhost:{line.port}/{vhost}")
        with slow.link([queues.up], 1, "site") as link:
            link.publish(queues.up, "m", [bytes(10**6)])
            events = [link.receive(20.0) for _ in range(2)]
            assert {type(event) for event in events} == {Confirmed, Delivery}, events
            link.acknowledge(next(event for event in events if isinstance(event, Delivery)))
            assert link.receive(2.0) is None
        assert line.passed("up") < 1.5e6
    assert broker.depth(queues.up) == 0


def test_hosts_of_no_common_cluster(url: str, queues: SiteQueues, rabbitmq: RabbitNode, tmp_path: Path) -> None:
    with RabbitNode(tmp_path / "stranger") as stranger:
        vhost = RabbitBroker(url)._addresses[0].virtual_host
        stranger.ctl("add_vhost", vhost)
        stranger.ctl("set_permissions", "-p", vhost, "guest", ".*", ".*", ".*")
        with pytest.raises(BrokerError, match="E212"):
            RabbitBroker(f"{url.rpartition('/')[0]},127.0.0.1:{stranger.port}/{vhost}").declare(queues)


def test_the_type_of_a_queue_is_never_left_to_the_broker() -> None:
    up = site_queues("run", "site", 1000).up
    assert arguments(up, quorum=False)["x-queue-type"] == "classic"
    quorum = arguments(up, quorum=True)
    assert quorum["x-queue-type"] == "quorum"
    assert quorum["x-delivery-limit"] == 2**31 - 1
    assert quorum["x-consumer-disconnected-timeout"] == 10_000
    assert quorum["x-overflow"] == "reject-publish"
