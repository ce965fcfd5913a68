"""What a site may do at broker and store: every site with every resource, and nothing but its own is open."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import socket
import ssl
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPSConnection
from typing import Any

import pika
import pytest
import redis

from nightsplit.broker.rabbitmq.address import read_addresses
from nightsplit.broker.rabbitmq.broker import RabbitBroker
from nightsplit.broker.rabbitmq.version import FIRST_UNSYNCED
from nightsplit.broker.topology import POLICIES, query_queues, site_queues
from nightsplit.console.keys.admin import administrator
from nightsplit.shared.run_store.redis import RedisStore
from nightsplit.shared.run_store.status import UNREADABLE, Phase, WorkerStatus
from tests.harness.centre import SITES, Centre

pytestmark = [pytest.mark.rabbitmq, pytest.mark.redis]

Act = Callable[[Any], object]
RUNS = ("night-1", "night-2")
QUEUES = [(site, of(run, site, 2**20)) for run, of, site in itertools.product(RUNS, (site_queues, query_queues), SITES)]
"""Each site with its queues, for training and for queries, in two runs."""
SCRIPT = "return redis.call('SET', KEYS[1], ARGV[1])"
SET_BY_SCRIPT = hashlib.sha1(SCRIPT.encode()).hexdigest()
STORED = ("lease", "pointer", "journal", "status:server", *(f"status:{site}" for site in SITES))


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    with Centre(tmp_path_factory.mktemp("centre")) as centre:
        broker = RabbitBroker(centre.broker("server"), credentials=centre.credentials("server"))
        broker.declare(queue for _, queues in QUEUES for queue in queues)
        for run in RUNS:
            with closing(RedisStore(centre.store("server"), run, centre.credentials("server"))) as store:
                store.acquire_lease("server", 60)
                store.claim_position(1, "north")
                for worker in ("server", *SITES):
                    store.put_status(worker, WorkerStatus(phase=Phase.WORKING))
        yield centre


def connect(centre: Centre, worker: str) -> pika.BlockingConnection:
    return pika.BlockingConnection(read_addresses(centre.broker(worker), 30, centre.credentials(worker)))


def permitted(connection: pika.BlockingConnection, act: Act) -> bool:
    """Whether the broker lets `act` happen, on a channel of its own."""
    channel = connection.channel()
    channel.confirm_delivery()
    try:
        act(channel)
    except pika.exceptions.UnroutableError:
        return True  # it was let through to an exchange
    except pika.exceptions.ChannelClosedByBroker as refusal:
        if refusal.reply_code not in (403, 406):
            raise
        return False
    channel.close()
    return True


def publishing(exchange: str, key: str, user: str | None = None) -> Act:
    properties = pika.BasicProperties(user_id=user)
    return lambda channel: channel.basic_publish(exchange, key, b"", properties, mandatory=True)


def attempts(site: str, version: tuple[int, ...]) -> Iterator[tuple[str, bool, Act]]:
    """What a site tries: in words, whether it may, and how."""
    mine = [queues for owner, queues in QUEUES if owner == site]
    for owner, queues in QUEUES:
        own = owner == site
        exchange = queues.up.exchange
        for queue in queues:
            name, key = queue.name, queue.key
            yield f"publish to {name}", own and key not in ("down", "answer"), publishing(queue.exchange, key)
            yield f"publish to {name} by the default exchange", False, publishing("", name)
            # In earlier versions everybody sees the depth of a queue with a known name.
            yield (
                f"see {name}", own or version < (4, 2, 7),
                lambda channel, name=name: channel.queue_declare(name, passive=True),
            )  # fmt: skip
            readable = own and key not in ("up", "ask")
            if version < FIRST_UNSYNCED:  # a quorum queue with a single active consumer knows no get
                yield f"get from {name}", readable, lambda channel, name=name: channel.basic_get(name)
            yield (
                f"consume {name}", readable,
                lambda channel, name=name: channel.basic_consume(name, lambda *message: None),
            )  # fmt: skip
            yield f"purge {name}", readable, lambda channel, name=name: channel.queue_purge(name)
            yield f"delete {name}", False, lambda channel, name=name: channel.queue_delete(name)
            for source in (exchange, mine[0].up.exchange, "amq.fanout", ""):
                yield (
                    f"bind {name} to {source}", False,
                    lambda channel, name=name, source=source: channel.queue_bind(name, source, "x"),
                )  # fmt: skip
                yield (
                    f"unbind {name} from {source}", False,
                    lambda channel, name=name, source=source, key=key: channel.queue_unbind(name, source, key),
                )  # fmt: skip
        yield f"delete {exchange}", False, lambda channel, exchange=exchange: channel.exchange_delete(exchange)
        yield (
            f"bind {exchange} to its own", False,
            lambda channel, exchange=exchange: channel.exchange_bind(exchange, mine[0].up.exchange, "up"),
        )  # fmt: skip
        yield (
            f"declare {exchange} otherwise", False,
            lambda channel, exchange=exchange: channel.exchange_declare(exchange, "fanout"),
        )  # fmt: skip
    for exchange in ("amq.direct", "amq.fanout", "amq.topic", "amq.headers", "amq.rabbitmq.trace"):
        yield f"publish to {exchange}", False, publishing(exchange, "x")
    for name in ("mine", f"nightsplit.night-1.{site}.more", f"nightsplit.night-3.{site}.down", ""):
        yield f"declare queue {name!r}", False, lambda channel, name=name: channel.queue_declare(name)
        yield f"declare exchange {name!r}", False, lambda channel, name=name: channel.exchange_declare(name or "e")
    for user in ("server", "admin", *(other for other in SITES if other != site)):
        yield f"publish as {user}", False, publishing(mine[0].up.exchange, "up", user)
    yield "publish as itself", True, publishing(mine[0].up.exchange, "up", site)


@pytest.mark.parametrize("site", SITES)
def test_a_site_reaches_its_own_queues_alone(centre: Centre, site: str) -> None:
    with closing(connect(centre, site)) as connection:
        tries = attempts(site, centre.node.version)
        wrong = [what for what, may, act in tries if permitted(connection, act) is not may]
    assert wrong == []


def test_e2_a_site_fills_no_queue_of_the_server_and_no_disk_with_dead_letters(centre: Centre) -> None:
    """Messages to its own `down` reach no queue; the oldest of too many dead letters make room."""
    queues = site_queues("night-1", "north", 2**20)
    with closing(connect(centre, "north")) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for key in ("down", "answer"):
            with pytest.raises(pika.exceptions.UnroutableError):
                channel.basic_publish(queues.up.exchange, key, b"x", mandatory=True)
        large = pika.BasicProperties(headers={"x": "y" * 100_000})
        for number in range(30):
            channel.basic_publish(queues.dead.exchange, "dead", b"%d" % number, large, mandatory=True)
    found = centre.node.ctl("list_queues", "-p", "nightsplit", "name", "policy").splitlines()
    policies = dict(line.split("\t") for line in found if line.startswith("nightsplit."))
    of_keys = {"dead": "dead", "up": "up", "ask": "up"}
    for_classic = {"dead": "lazy-dead", "up": "lazy-up", "ask": "lazy-up"}
    is_quorum = centre.node.version >= (3, 13)
    assert policies == {
        queue.name: of_keys.get(queue.key, "") if is_quorum else for_classic.get(queue.key, "lazy")
        for _, of_site in QUEUES for queue in of_site
    }  # fmt: skip
    # The same policy with a small number, at once: no test writes a GiB.
    definition = json.dumps({**POLICIES["dead"][1], "max-length": 10})
    centre.node.ctl("set_policy", "-p", "nightsplit", "--priority", "9", "small", r"^nightsplit\..*\.dead$", definition)
    try:
        with closing(connect(centre, "north")) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            for number in range(30, 60):
                channel.basic_publish(queues.dead.exchange, "dead", b"%d" % number, mandatory=True)  # never refused
            deliveries = channel.consume(queues.dead.name, auto_ack=True, inactivity_timeout=5)
            held = [next(deliveries)[2] for _ in range(11)]
    finally:
        centre.node.ctl("clear_policy", "-p", "nightsplit", "small")
    assert held == [*(b"%d" % number for number in range(50, 60)), None]


@pytest.mark.parametrize("site", SITES)
def test_a_site_reaches_no_other_virtual_host(centre: Centre, site: str) -> None:
    parameters = read_addresses(centre.broker(site), 30, centre.credentials(site))[0]
    parameters.virtual_host = "/"
    with pytest.raises(pika.exceptions.ProbableAccessDeniedError):
        pika.BlockingConnection(parameters)


def commands(site: str) -> Iterator[tuple[tuple[str, ...], bool]]:
    """What a site tries at the store, and whether it may."""
    for run in RUNS:
        for name in STORED:
            key = f"nightsplit:{{{run}}}:{name}"
            own, readable = name == f"status:{site}", name in ("status:server", f"status:{site}")
            yield ("LSET", key, "0", "x"), own
            yield ("LINDEX", key, "0"), readable
            yield from (((word, key), False) for word in ("GET", "MGET", "DEL", "HGETALL", "DUMP", "TYPE", "UNLINK"))
            yield from (((word, key, "x"), False) for word in ("SET", "RPUSH", "LPUSH", "RPUSHX", "APPEND", "SADD"))
            yield ("EVALSHA", SET_BY_SCRIPT, "1", key, "x"), False
            yield ("EVAL", SCRIPT, "1", key, "x"), False
            yield ("HSET", key, "fence", "9"), False
            yield ("RENAME", key, f"nightsplit:{{{run}}}:status:{site}"), False
        yield ("LSET", f"nightsplit:{{{run}-unopened}}:status:{site}", "0", "x"), False
    for command in (
        "SCRIPT LOAD return", "EVAL return 0", "FCALL f 0",
        "KEYS *", "SCAN 0", "FLUSHALL", "FLUSHDB", "CONFIG GET *", "ACL LIST", "ACL SETUSER north on nopass ~* +@all",
        "INFO", "MONITOR", "SHUTDOWN", "CLIENT LIST", "SAVE", "SUBSCRIBE x", "PUBLISH x y", "SELECT 1",
        "FUNCTION LIST", "SCRIPT FLUSH", "SLAVEOF localhost 1", "MODULE LIST", "SWAPDB 0 1",
    ):  # fmt: skip
        yield tuple(command.split()), False


@pytest.mark.parametrize("site", SITES)
def test_a_site_says_how_it_is_and_reads_how_the_server_is(centre: Centre, site: str) -> None:
    credentials = centre.credentials(site)
    login = {"username": site, "password": credentials.secret(), "ssl": True, "ssl_ca_certs": str(credentials.ca)}
    login |= {"ssl_certfile": str(credentials.certificate), "ssl_keyfile": str(credentials.key)}
    host, port = centre.addresses.store.split(":")
    wrong = []
    with closing(RedisStore(centre.store("server"), "night-1", centre.credentials("server"))) as store:
        assert store._redis.script_load(SCRIPT) == SET_BY_SCRIPT
    with closing(redis.Redis(host, int(port), **login)) as client:
        for command, may in commands(site):
            try:
                client.execute_command(*command)
                done = True
            except redis.exceptions.NoPermissionError:
                done = False
            except redis.exceptions.ResponseError as error:
                if "no such key" not in str(error):
                    raise
                done = False
            if done is not may:
                wrong.append(command)
    assert wrong == []


def test_e4_e5_a_site_stops_no_store_and_fills_none(centre: Centre) -> None:
    """Endless scripts, statuses of runs that do not exist, and enormous ones."""
    with (
        closing(centre.keys.services().connect_redis()) as admin,
        closing(RedisStore(centre.store("north"), "night-1", centre.credentials("north"))) as north,
        closing(RedisStore(centre.store("server"), "night-1", centre.credentials("server"))) as server,
    ):
        keys, memory = admin.dbsize(), admin.info("memory")["used_memory"]
        for script in ("while true do end", "return redis.call('DEBUG', 'SLEEP', 60)"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                north._redis.eval(script, 1, north._status("north"))
        own = north._status("north")
        for number in range(200):
            with pytest.raises(redis.ResponseError, match="no such key"):
                north._redis.lset(own.replace("night-1", f"night-{number + 100}"), 0, "x" * 2**19)
        with closing(RedisStore(centre.store("north"), "night-77", centre.credentials("north"))) as unopened:
            unopened.put_status("north", WorkerStatus(phase=Phase.WAITING))  # no error: a site may start first
            assert unopened.statuses(["north"]) == {}
        for size in (2**20 + 1, 2**26):
            with pytest.raises((redis.ResponseError, redis.ConnectionError)):
                north._redis.lset(own, 0, "x" * size)
        north._redis.lset(own, 0, "x" * (2**20 - 1))
        assert server.statuses(["north"])["north"].report is UNREADABLE
        assert server.renew_lease("server", server.acquire_lease("server", 60) or 0, 60)
        assert admin.dbsize() == keys
        assert admin.info("memory")["used_memory"] - memory < 2**24
        north.put_status("north", WorkerStatus(phase=Phase.WORKING))
        assert server.statuses(["north"])["north"].online


def test_the_server_looks_after_runs_and_not_after_redis(centre: Centre) -> None:
    with closing(RedisStore(centre.store("server"), "night-9", centre.credentials("server"))) as store:
        assert store.acquire_lease("server", 60) == 1
        for command in ("FLUSHALL", "CONFIG GET *", "ACL LIST", "SHUTDOWN"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                store._redis.execute_command(*command.split())


def test_there_is_no_guest_and_no_way_around_the_certificate(centre: Centre) -> None:
    host, port = centre.addresses.broker.split(":")
    assert "guest" not in centre.node.ctl("list_users")
    with pytest.raises(pika.exceptions.AMQPConnectionError):
        pika.BlockingConnection(pika.ConnectionParameters(host, int(port), socket_timeout=3, stack_timeout=5))
    for address in (centre.addresses.broker, centre.addresses.store):
        nobody = ssl.create_default_context(cafile=centre.credentials("north").ca)
        host, port = address.split(":")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            greet(host, int(port), nobody)


def test_broker_and_store_answer_other_machines_with_a_certificate_alone(centre: Centre) -> None:
    """Also the metrics of RabbitMQ, its management, and Erlang's distribution."""
    found = centre.node.listeners() | centre.redis.listeners()
    ports = {port for address, port in found if not address.is_loopback}
    addresses = (centre.addresses.broker, centre.addresses.management, centre.addresses.store)
    assert ports > {int(address.rpartition(":")[2]) for address in addresses}  # and the metrics
    keys = centre.keys.folder / "centre"
    nobody = ssl.create_default_context(cafile=keys / "ca.pem")
    for port in ports:
        with (
            socket.create_connection(("localhost", port), timeout=5) as plain,
            administrator(keys).tls().wrap_socket(plain, server_hostname="localhost"),
        ):
            pass  # it is TLS
        with pytest.raises((ssl.SSLError, ConnectionError)):
            greet("localhost", port, nobody)


def greet(host: str, port: int, context: ssl.SSLContext) -> None:
    """With TLS 1.3 the refusal of a certificate comes after the handshake."""
    with (
        socket.create_connection((host, port), timeout=5) as line,
        context.wrap_socket(line, server_hostname=host, do_handshake_on_connect=False) as secure,
    ):
        secure.do_handshake()
        secure.sendall(b"AMQP\x00\x00\x09\x01")
        secure.recv(1)


@pytest.mark.parametrize("service", ["broker", "store", "management"])
def test_old_tls_is_refused(centre: Centre, service: str) -> None:
    host, port = getattr(centre.addresses, service).split(":")
    old = centre.credentials("north").tls()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # which says what this test says
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        greet(host, int(port), old)


@pytest.mark.parametrize("worker", ["server", "north"])
def test_workers_have_no_access_to_the_management(centre: Centre, worker: str) -> None:
    credentials = centre.credentials(worker)
    login = base64.b64encode(f"{worker}:{credentials.secret()}".encode()).decode()
    host, port = centre.addresses.management.split(":")
    with closing(HTTPSConnection(host, int(port), timeout=10, context=credentials.tls())) as line:
        line.request("GET", "/api/queues", headers={"Authorization": f"Basic {login}"})
        assert line.getresponse().status == 401
