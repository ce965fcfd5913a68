"""Addresses of RabbitMQ and Redis (attack C4): what is refused, and what the libraries are given of the rest."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from nightsplit.broker.connect import open_broker
from nightsplit.broker.rabbitmq.address import read_addresses
from nightsplit.broker.rabbitmq.probe import Probe
from nightsplit.console.keys.ca import Authority
from nightsplit.shared.address import read_address
from nightsplit.shared.credentials import NO_CREDENTIALS, Credentials
from nightsplit.shared.errors import ConfigError
from nightsplit.shared.run_store.connect import open_store
from nightsplit.shared.run_store.redis import redis_client

READ_DIFFERENTLY = [
    # C4a: urlsplit finds localhost, pika and redis-py connect to the other one; or the reverse.
    "{plain}://evil.example#@localhost/", "{plain}://evil.example?x@localhost/", "{plain}://evil.example\\@localhost/",
    "{plain}://localhost#@evil.example/", "{plain}://localhost?@evil.example/", "{plain}://localhost\\@evil.example/",
    "{plain}://evil.example/@localhost/", "{plain}://a@evil.example@localhost/", "{plain}://a:b:c@localhost/",
    "{plain}://localhost:1:2/", "{plain}://localhost:5672@evil.example:x/", "{plain}://[::1]evil.example/",
    "{plain}://[::1/", "{plain}://::1/", "{plain}://[localhost]/", "{plain}://[fe80::1%25lo]/", "{plain}://",
    "{plain}:///", "{plain}://,/", "{plain}://localhost,/", "{plain}://user@/", "{plain}:localhost",
    "{plain}:/localhost",
    # Signs that some remove, some keep and some stop at.
    "{plain}://local\thost/", "{plain}://localhost\n/", "{plain}://localhost/\n", " {plain}://localhost/",
    "{plain}://localhost /", "{plain}://local\x00host/", "{plain}://localhost/0\r\n", "{plain}://localho\u017ft/",
    "{plain}://localhost%00.evil.example/", "{plain}://localhost%2eevil.example/", "{plain}://l\u2024ocalhost/",
    "{plain}://user%0a@localhost/", "{plain}://user%ff@localhost/", "{plain}://user%4@localhost/",
    "{plain}://localhost/0/1", "{plain}://localhost:0/", "{plain}://localhost:65536/", "{plain}://localhost:+1/",
    "{plain}://localhost:\u0661/", "{plain}://localhost:1 /", "{PLAIN}://localhost/",
    # C4b: options, those that weaken TLS and all others.
    "{tls}://host/0?ssl_cert_reqs=none&ssl_check_hostname=False", "{tls}://host/0?ssl_cert_reqs=none",
    "{tls}://host/?ssl_options=%7B%27verify_mode%27%3A0%7D", "{tls}://host/?ssl_ca_certs=/tmp/ca.pem",
    "{tls}://host?ssl_min_version=TLSv1", "{tls}://host/0?db=1", "{tls}://host/?heartbeat=0", "{tls}://host/0#x",
    "{tls}://host/0;ssl_cert_reqs=none", "{tls}+x://host/", "unix:///run/redis.sock", "http://host/", "amqp+ssl://host/",
]  # fmt: skip

OF_ANOTHER_MACHINE = [
    "{plain}://broker.example/", "{plain}://10.0.0.7/", "{plain}://host:6379/0", "{plain}://localhost@broker.example/",
    "{plain}://127.0.0.1.example/", "{plain}://127.0.0.1@10.0.0.7/", "{plain}://[2001:db8::7]:5672/",
    "{plain}://0.0.0.0/", "{plain}://[::]/", "{plain}://[::ffff:10.0.0.7]/", "{plain}://2130706433/",
    "{plain}://0x7f000001/", "{plain}://127.1/", "{plain}://0177.0.0.1/", "{plain}://localhost./",
    "{plain}://localhost.localdomain/", "{plain}://user%40localhost@broker.example/", "amqp://localhost:1,broker.example/",
]  # fmt: skip

SERVICES = [{"plain": "amqp", "PLAIN": "AMQP", "tls": "amqps"}, {"plain": "redis", "PLAIN": "REDIS", "tls": "rediss"}]


def both(addresses: list[str]) -> list[str]:
    """Each address for RabbitMQ and for Redis."""
    return list(dict.fromkeys(address.format(**service) for service in SERVICES for address in addresses))


@pytest.mark.parametrize("text", both(READ_DIFFERENTLY), ids=ascii)
def test_c4_an_address_that_parsers_read_differently(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_address(text)
    assert refusal.value.number == 107
    assert refusal.value.sentence.isprintable()


@pytest.mark.parametrize("text", both(OF_ANOTHER_MACHINE))
def test_c4_an_unencrypted_address_of_another_machine(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_address(text)
    assert refusal.value.number == 111


@pytest.mark.parametrize(
    "text", ["rediss://one,two/0", "rediss://host/one", "redis://localhost/-1", "redis://localhost/1.5"]
)
def test_an_address_that_no_redis_has(text: str) -> None:
    with pytest.raises(ConfigError, match="E107"):
        read_address(text)


@pytest.mark.parametrize(
    "text", ["amqp://guest:sec/ret@127.0.0.1/", "rediss://a:sec#ret@host/", "amqps://a:sec@ret@h/"]
)
def test_a_refusal_keeps_the_password(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_address(text)
    assert "sec" not in str(refusal.value)
    assert "sec" not in repr(read_address("amqps://a:sec@host/"))
    assert "sec" not in str(read_address("amqps://a:sec@host/"))


@pytest.mark.parametrize("open_it", [
    lambda text: open_broker(text, Path(), 2**20), lambda text: open_store(text, "night-1", Path()),
    lambda text: Probe(text, NO_CREDENTIALS), lambda text: read_addresses(text, 30, NO_CREDENTIALS),
], ids=["broker", "store", "probe", "link"])  # fmt: skip
@pytest.mark.parametrize("scheme", ["amqp", "redis"])
def test_c4_no_connection_goes_around_the_check(open_it, scheme: str) -> None:
    for address in ("evil.example#@localhost/", "evil.example/"):
        with pytest.raises(ConfigError) as refusal:
            open_it(f"{scheme}://{address}")
        assert refusal.value.number in (107, 111)


@pytest.mark.parametrize(("text", "places", "login", "path"), [
    ("amqp://localhost", [("localhost", 5672)], ("guest", "guest"), "/"),
    ("amqp://guest@localhost/", [("localhost", 5672)], ("guest", "guest"), "/"),
    ("amqp://north:secret@127.0.0.1:5673/%2F", [("127.0.0.1", 5673)], ("north", "secret"), "/"),
    ("amqp://north:%40%3A%2F%23%25@[::1]:5673/ward", [("::1", 5673)], ("north", "@:/#%"), "ward"),
    ("amqps://n%C3%B6rth@one,two:5673,[2001:DB8::7]:1/a%2Fb",
     [("one", 5671), ("two", 5673), ("2001:db8::7", 1)], ("nörth", ""), "a/b"),
    ("amqps://north@Broker.Example:5671/nightsplit", [("broker.example", 5671)], ("north", ""), "nightsplit"),
])  # fmt: skip
def test_what_pika_is_given(text, places, login, path) -> None:
    addresses = read_addresses(text, 30, NO_CREDENTIALS)
    assert [(given.host, given.port) for given in addresses] == places
    for given in addresses:
        assert (given.credentials.username, given.credentials.password) == login
        assert given.virtual_host == path
        assert (given.heartbeat, given.socket_timeout, given.stack_timeout) == (30, 5, 10)
        if text.startswith("amqps"):
            context = given.ssl_options.context
            assert given.ssl_options.server_hostname == given.host
            assert context.verify_mode is ssl.CERT_REQUIRED
            assert context.check_hostname
            assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        else:
            assert given.ssl_options is None


@pytest.mark.parametrize(("text", "host", "port", "login", "database"), [
    ("redis://localhost", "localhost", 6379, (None, None), 0),
    ("redis://:secret@127.0.0.1:6380/7", "127.0.0.1", 6380, (None, "secret"), 7),
    ("redis://north:a%23b@[::1]/", "::1", 6379, ("north", "a#b"), 0),
    ("rediss://north@store.example/0", "store.example", 6379, ("north", None), 0),
])  # fmt: skip
def test_what_redis_py_is_given(text, host, port, login, database) -> None:
    pool = redis_client(read_address(text), NO_CREDENTIALS).connection_pool
    given = pool.make_connection()
    assert (given.host, given.port, given.db) == (host, port, database)
    assert (given.username, given.password) == login
    if text.startswith("rediss"):
        assert given.cert_reqs is ssl.CERT_REQUIRED
        assert given.check_hostname is True
        assert given.ssl_min_version is ssl.TLSVersion.TLSv1_2
    else:
        assert not hasattr(given, "cert_reqs")


def test_the_password_of_the_file_comes_first(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    authority.issue("north", tmp_path / "certificate.pem", tmp_path / "key.pem")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    (tmp_path / "password").write_text("of the file\n")
    files = Credentials(*(tmp_path / name for name in ("ca.pem", "certificate.pem", "key.pem", "password")))
    for login in ("north", "north:of-the-address"):
        assert read_addresses(f"amqps://{login}@host/", 30, files)[0].credentials.password == "of the file"
        given = redis_client(read_address(f"rediss://{login}@host/0"), files).connection_pool.make_connection()
        assert given.password == "of the file"
        assert (given.ca_certs, given.certfile, given.keyfile) == tuple(
            str(tmp_path / name) for name in ("ca.pem", "certificate.pem", "key.pem")
        )
